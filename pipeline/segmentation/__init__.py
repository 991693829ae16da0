"""Which px of a slide a network calls tissue: networks of others, as files, run on a slide in small.

A network's file with what is said of it, and an open slide, come in; a mask comes out. Nothing is known of patches, of
where they are stored, or of the networks that learn here.
"""
