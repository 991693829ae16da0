"""What can be set: every field with its meaning, unit and default, and how YAML and overrides become one recipe.

Names and `key=value` come in; a validated, frozen config with a fingerprint comes out, or all of its problems at
once. It must not read data or know who uses a field.
"""
