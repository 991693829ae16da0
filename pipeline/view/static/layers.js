// Which layers there are, what they are called, and which one is meant.

const NAMES = {
  tissue: "Tissue (the rest darkened)",
  read: "Patches read (the rest darkened)",
  difference: "Difference of the models",
};

// Those that a slide has, with their numbers.
export const layersOf = (site, info) =>
  site.layers
    .map((layer, index) => ({ ...layer, number: index }))
    .filter((layer) => info.layers.includes(layer.number));

// As the address has it: the second model's with its number.
export const keyOf = ({ name, model }) => (model ? `${name}@${model}` : name);

// `models`: their names, where the layer's title has to tell them apart.
export function titleOf({ name, model }, models) {
  const said = NAMES[name] ?? name.replace(/^effect_/, "effect: ").replace(/^attention_/, "attention: ");
  const words = said[0].toUpperCase() + said.slice(1);
  return model !== null && models.length > 1 ? `${words}, ${models[model]}` : words;
}

// The layer of a key; in one of two windows (`pane`: its number) that model's of the same name. Null: none.
export function layerIn(layers, key, pane) {
  const [name] = key.split("@");
  const meant = (layer) =>
    pane !== null && layer.model !== null ? layer.name === name && layer.model === pane : keyOf(layer) === key;
  return layers.find(meant) ?? null;
}
