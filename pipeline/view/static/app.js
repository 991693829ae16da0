// The page: what is chosen, and what follows from it.

import { askSlide, askSlides } from "./ask.js";
import { listen } from "./keys.js";
import { drawList, drawPanel, filterList, markCurrent, number } from "./list.js";
import { Pane } from "./pane.js";
import { readPlace, writePlace } from "./place.js";

const at = (id) => document.getElementById(id);
const NAMES = {
  tissue: "Tissue (the rest darkened)",
  read: "Patches read (the rest darkened)",
  difference: "Difference of the models",
};

let site; // what there is
let info = null; // of the slide that is shown
let panes = [];
let leader = null; // the pane that the others follow
const chosen = { slide: 0, layer: "", opacity: 0.7, frames: true, pair: false, patch: null };

const title = ({ name, model }) => {
  const said = NAMES[name] ?? name.replace(/^effect_/, "effect: ").replace(/^attention_/, "attention: ");
  const words = said[0].toUpperCase() + said.slice(1);
  return model !== null && site.models.length > 1 && !chosen.pair ? `${words}, ${site.models[model]}` : words;
};

const layers = () =>
  site.layers
    .map((layer, index) => ({ ...layer, number: index }))
    .filter((layer) => info.layers.includes(layer.number));
const keyOf = ({ name, model }) => (model ? `${name}@${model}` : name);
const layerOf = (pane) => {
  const [name] = chosen.layer.split("@");
  const found = layers().find((layer) =>
    chosen.pair && layer.model !== null ? layer.name === name && layer.model === pane : keyOf(layer) === chosen.layer,
  );
  return found ? { ...found, title: title(found) } : null;
};
const model = () => info.models[Number(chosen.layer.split("@")[1] ?? 0)] ?? info.models[0];

function trouble(words) {
  at("trouble").textContent = words;
  at("trouble").hidden = !words;
}

function makePanes() {
  const wanted = chosen.pair ? 2 : 1;
  if (panes.length === wanted) return false;
  panes.forEach((pane) => pane.end());
  panes = Array.from({ length: wanted }, () => new Pane(follow, trouble));
  at("panes").append(...panes.map((pane) => pane.element));
  panes.forEach((pane) => {
    pane.start();
    for (const event of ["pointerdown", "wheel", "pointerenter"])
      pane.element.addEventListener(event, () => (leader = pane), { capture: true, passive: true });
  });
  [leader] = panes;
  return true;
}

function follow(pane) {
  if (pane !== leader) return;
  for (const other of panes) if (other !== pane && other.info === info) other.go(pane.view);
  remember();
}

let remembering = 0;
function remember() {
  clearTimeout(remembering);
  remembering = setTimeout(() => {
    if (!info) return;
    const { slide, layer, opacity, frames, pair, patch } = chosen;
    const words = {
      slide: site.slides[slide].id,
      layer,
      frames: frames ? undefined : "no",
      pair: pair ? "yes" : undefined,
    };
    writePlace({ ...words, ...leader.view, opacity, patch: patch === null ? null : patch + 1 });
  }, 150);
}

async function showSlide(index, place = {}) {
  chosen.slide = index;
  chosen.patch = null;
  info = null;
  trouble("");
  markCurrent(at("list"), index);
  const slide = site.slides[index];
  document.title = slide.id;
  drawPanel(at("panel"), slide, site.models, null, null);
  makePanes();
  try {
    const found = await askSlide(site.tag, index);
    if (chosen.slide !== index) return; // another one was chosen meanwhile
    info = found;
    await Promise.all(panes.map((pane) => pane.show(site.tag, index, found)));
  } catch (error) {
    trouble(`${slide.id}: ${error.message}`);
    return;
  }
  if (chosen.slide !== index || !info) return;
  const there = place.x !== undefined && place.y !== undefined && place.z > 0;
  for (const pane of panes) there ? pane.go(place, true) : pane.goWhole(true);
  listLayers();
  await lay();
  if (place.patch) showPatch(place.patch - 1, !there);
  else drawPatch();
  document.documentElement.dataset.shown = slide.id;
}

function listLayers() {
  const options = layers()
    .filter((layer) => !(chosen.pair && layer.model > 0))
    .map((layer) => new Option(title(layer), keyOf(layer)));
  at("layer").replaceChildren(new Option("None", ""), ...options);
  const known = options.some(({ value }) => value === chosen.layer);
  if (!known)
    chosen.layer = chosen.layer === "" ? "" : (options.find(({ value }) => value === "attention")?.value ?? "");
  at("layer").value = chosen.layer;
}

async function lay() {
  panes.forEach((pane, index) => {
    pane.name(panes.length > 1 ? site.models[index] : "");
    const squares = info.models[chosen.pair ? index : 0]?.frames ?? [];
    pane.frame("frame", chosen.frames ? squares : []);
  });
  await Promise.all(panes.map((pane, index) => pane.lay(layerOf(index), chosen.opacity)));
  remember();
}

function drawPatch() {
  const top = model()?.top ?? [];
  const patch = chosen.patch === null ? null : top[chosen.patch];
  for (const pane of panes) pane.frame("focus", patch ? [[patch.x, patch.y, patch.size]] : []);
  at("patch").textContent = patch ? `Patch ${chosen.patch + 1} of ${top.length}` : `${top.length} top patches`;
  at("previous").disabled = at("next").disabled = !top.length;
  const rows =
    patch &&
    Object.entries(patch.values).map(([name, value]) => [
      name === "attention" ? "attention" : name.replace("_", ": "),
      name.startsWith("attention") ? `${number(value)}\u00d7 uniform` : number(value),
    ]);
  const told = patch && {
    title: `Patch ${chosen.patch + 1}`,
    rows: [...rows, ["corner", `${patch.x}, ${patch.y} px`], ["selected", patch.selected ? "yes" : "no"]],
  };
  drawPanel(at("panel"), site.slides[chosen.slide], site.models, info, told);
  if (patch)
    at("said").textContent =
      `Patch ${chosen.patch + 1} of ${top.length}: ${rows.map((row) => row.join(" ")).join(", ")}`;
}

// Patches are shown with four times their edge around them.
function showPatch(index, move = true) {
  const top = model()?.top ?? [];
  if (!top.length) return;
  chosen.patch = (index + top.length) % top.length;
  const { x, y, size } = top[chosen.patch];
  const box = leader.picture.getBoundingClientRect();
  if (move) leader.go({ x: x + size / 2, y: y + size / 2, z: (5 * size) / Math.min(box.width, box.height) });
  drawPatch();
  remember();
}

function setOpacity(share) {
  chosen.opacity = Math.min(1, Math.max(0, share));
  at("opacity").value = String(Math.round(100 * chosen.opacity));
  panes.forEach((pane) => pane.setOpacity(chosen.opacity));
  remember();
}

function setLayer(value) {
  chosen.layer = at("layer").value = value;
  at("said").textContent = `Layer: ${at("layer").selectedOptions[0]?.textContent ?? "none"}`;
  return lay();
}

function turnLayer(by) {
  const values = [...at("layer").options].map(({ value }) => value);
  setLayer(values[(values.indexOf(chosen.layer) + by + values.length) % values.length]);
}

function setFrames(on) {
  chosen.frames = at("frames").checked = on;
  if (info) lay();
}

async function setPair(on) {
  if (site.models.length < 2) return;
  const place = info && { ...leader.view, patch: chosen.patch === null ? undefined : chosen.patch + 1 };
  chosen.pair = at("pair").checked = on;
  if (on) chosen.layer = chosen.layer.split("@")[0];
  await showSlide(chosen.slide, place ?? {});
}

function nextSlide(by) {
  const rows = [...at("list").children].map((row, index) => (row.hidden ? -1 : index)).filter((index) => index >= 0);
  const place = rows.indexOf(chosen.slide);
  const index = rows[(place + by + rows.length) % rows.length];
  if (index !== undefined) showSlide(index);
}

const STEP = 0.2;
const MOVES = {
  ArrowLeft: [-STEP, 0, 1],
  ArrowRight: [STEP, 0, 1],
  ArrowUp: [0, -STEP, 1],
  ArrowDown: [0, STEP, 1],
  "+": [0, 0, 1.5],
  "=": [0, 0, 1.5],
  "-": [0, 0, 1 / 1.5],
};
const KEYS = [
  {
    keys: ["n"],
    shown: ["n"],
    what: "next patch by attention",
    does: () => showPatch(chosen.patch === null ? 0 : chosen.patch + 1),
  },
  {
    keys: ["p"],
    shown: ["p"],
    what: "previous patch",
    does: () => showPatch(chosen.patch === null ? -1 : chosen.patch - 1),
  },
  { keys: ["j"], shown: ["j"], what: "next slide", does: () => nextSlide(1) },
  { keys: ["k"], shown: ["k"], what: "previous slide", does: () => nextSlide(-1) },
  { keys: ["l", "L"], shown: ["l", "L"], what: "next, previous layer", does: (key) => turnLayer(key === "l" ? 1 : -1) },
  {
    keys: ["]", "["],
    shown: ["]", "["],
    what: "layer denser, clearer",
    does: (key) => setOpacity(chosen.opacity + (key === "]" ? 0.1 : -0.1)),
  },
  { keys: ["s"], shown: ["s"], what: "frames around selected patches", does: () => setFrames(!chosen.frames) },
  { keys: ["c"], shown: ["c"], what: "two models side by side", does: () => setPair(!chosen.pair) },
  { keys: ["h"], shown: ["h"], what: "whole slide", does: () => leader.goWhole() },
  {
    keys: Object.keys(MOVES),
    shown: ["\u2190", "\u2192", "\u2191", "\u2193", "+", "-"],
    what: "move, zoom",
    does: (key) => leader.nudge(...MOVES[key]),
  },
  { keys: ["?"], shown: ["?"], what: "these keys", does: () => at("keys").showModal() },
];

function wire() {
  at("filter").addEventListener("input", ({ target }) => filterList(at("list"), site.slides, target.value));
  at("layer").addEventListener("change", ({ target }) => setLayer(target.value));
  at("opacity").addEventListener("input", ({ target }) => setOpacity(target.value / 100));
  at("frames").addEventListener("change", ({ target }) => setFrames(target.checked));
  at("pair").addEventListener("change", ({ target }) => setPair(target.checked));
  at("next").addEventListener("click", () => KEYS[0].does());
  at("previous").addEventListener("click", () => KEYS[1].does());
  at("whole").addEventListener("click", () => leader.goWhole());
  at("help").addEventListener("click", () => at("keys").showModal());
  at("tools").addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", () => open(readPlace(location.hash)));
  listen(
    KEYS.map((key) => ({ ...key, does: (pressed) => (info || "jk?".includes(pressed)) && key.does(pressed) })),
    at("keys-table"),
  );
}

function open(place) {
  const index = Math.max(
    0,
    site.slides.findIndex(({ id }) => id === place.slide),
  );
  Object.assign(chosen, { layer: place.layer ?? "attention", pair: place.pair === "yes" && site.models.length > 1 });
  at("pair").checked = chosen.pair;
  chosen.frames = at("frames").checked = place.frames !== "no";
  setOpacity(place.opacity ?? chosen.opacity);
  return showSlide(index, place);
}

async function main() {
  site = await askSlides();
  at("title").textContent = site.models.join(" and ");
  at("pair-field").hidden = site.models.length < 2;
  drawList(at("list"), site.slides, (index) => showSlide(index));
  wire();
  if (site.slides.length) await open(readPlace(location.hash));
  else trouble("There are no slides.");
}

// For programs that look at the page: whether what is seen is all there.
window.settled = () => info !== null && panes.every((pane) => pane.settled);

main().catch((error) => trouble(error.message));
