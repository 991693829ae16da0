// Where one is, in the address: slide by its name, centre in level-0 px, level-0 px per px of the screen, layer.

const NUMBERS = ["x", "y", "z", "opacity", "patch"];
const WORDS = ["slide", "layer", "frames", "pair"];

export function readPlace(hash) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const place = {};
  for (const name of WORDS) if (given.has(name)) place[name] = given.get(name);
  for (const name of NUMBERS) {
    const value = Number(given.get(name));
    if (given.has(name) && given.get(name) !== "" && Number.isFinite(value)) place[name] = value;
  }
  return place;
}

export function writePlace(place) {
  const said = new URLSearchParams();
  for (const name of [...WORDS, ...NUMBERS]) {
    if (place[name] === undefined || place[name] === null) continue;
    said.set(name, typeof place[name] === "number" ? String(Number(place[name].toPrecision(9))) : place[name]);
  }
  history.replaceState(null, "", `#${said}`);
}
