// The page: what is chosen, and what follows from it.

import { askSlide, askSlides } from "./ask.js";
import { listenTo } from "./controls.js";
import { keyOf, layerIn, layersOf, titleOf } from "./layers.js";
import { drawList, drawPanel, markCurrent, number } from "./list.js";
import { Pane } from "./pane.js";
import { readPlace, writePlace } from "./place.js";

const at = (id) => document.getElementById(id);
let site; // what there is
let info = null; // of the slide that is shown
let panes = [];
let leader = null; // the pane that the others follow
const chosen = { slide: 0, layer: "", opacity: 0.7, frames: true, pair: false, patch: null, hidden: "attention" };

const layers = () => layersOf(site, info);
const title = (layer) => titleOf(layer, chosen.pair ? [] : site.models);
const model = () => info && (info.models[Number(chosen.layer.split("@")[1] ?? 0)] ?? info.models[0]);

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
    remembering = 0;
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

// `words`: a trouble that is told beside it.
async function showSlide(index, place = {}, words = "") {
  chosen.slide = index;
  chosen.patch = null;
  info = null;
  trouble(words);
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
  const { length } = model()?.top ?? [];
  if (Number.isInteger(place.patch) && place.patch >= 1 && place.patch <= length) showPatch(place.patch - 1, !there);
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
  panes.forEach((pane, index) => pane.name(panes.length > 1 ? site.models[index] : ""));
  drawFrames();
  const wanted = panes.map((_, index) => layerIn(layers(), chosen.layer, chosen.pair ? index : null));
  const laid = panes.map((pane, index) => {
    const layer = wanted[index];
    return pane.lay(layer && { ...layer, title: title(layer) }, chosen.opacity);
  });
  remember();
  await Promise.all(laid);
}

function drawFrames() {
  panes.forEach((pane, index) => {
    const squares = (chosen.frames && info.models[chosen.pair ? index : 0]?.frames) || [];
    pane.frame("frame", squares);
  });
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
      name.startsWith("attention") ? `${Number(value.toPrecision(3))}\u00d7 uniform` : number(value),
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

function move(how) {
  if (!info) return;
  how();
  remember();
}

function setOpacity(share) {
  chosen.opacity = Math.min(1, Math.max(0, share));
  at("opacity").value = String(Math.round(100 * chosen.opacity));
  panes.forEach((pane) => pane.setOpacity(chosen.opacity));
  remember();
}

function setLayer(value) {
  if (!info) return;
  chosen.layer = at("layer").value = value;
  at("said").textContent = `Layer: ${at("layer").selectedOptions[0]?.textContent ?? "none"}`;
  lay();
}

function turnLayer(by) {
  const values = [...at("layer").options].map(({ value }) => value);
  setLayer(values[(values.indexOf(chosen.layer) + by + values.length) % values.length]);
}

// Away with the layer, to look at the tissue, and back.
function hideLayer() {
  const hidden = chosen.layer === "" ? chosen.hidden : "";
  chosen.hidden = chosen.layer;
  setLayer(hidden);
}

function setFrames(on) {
  chosen.frames = at("frames").checked = on;
  if (info) drawFrames();
  remember();
}

async function setPair(on) {
  if (site.models.length < 2 || !info) return;
  const place = { ...leader.view, patch: chosen.patch === null ? undefined : chosen.patch + 1 };
  chosen.pair = at("pair").checked = on;
  if (on) chosen.layer = chosen.layer.split("@")[0];
  await showSlide(chosen.slide, place);
}

function nextSlide(by) {
  const rows = [...at("list").children].map((row, index) => (row.hidden ? -1 : index)).filter((index) => index >= 0);
  const place = rows.indexOf(chosen.slide);
  const index = rows[(place + by + rows.length) % rows.length];
  if (index !== undefined) showSlide(index);
}

const does = {
  next: () => showPatch(chosen.patch === null ? 0 : chosen.patch + 1),
  previous: () => showPatch(chosen.patch === null ? -1 : chosen.patch - 1),
  nextSlide,
  turnLayer,
  hideLayer,
  setLayer,
  setOpacity,
  denser: (by) => setOpacity(chosen.opacity + by),
  setFrames,
  turnFrames: () => setFrames(!chosen.frames),
  setPair,
  turnPair: () => setPair(!chosen.pair),
  whole: () => move(() => leader.goWhole()),
  nudge: (...by) => move(() => leader.nudge(...by)),
};

function open(place) {
  const index = site.slides.findIndex(({ id }) => id === place.slide);
  Object.assign(chosen, { layer: place.layer ?? "attention", pair: place.pair === "yes" && site.models.length > 1 });
  at("pair").checked = chosen.pair;
  chosen.frames = at("frames").checked = place.frames !== "no";
  setOpacity(place.opacity ?? chosen.opacity);
  if (place.slide === undefined || index >= 0) return showSlide(Math.max(0, index), place);
  return showSlide(0, {}, `no slide ${place.slide} here; this is the first`); // the place is one of another slide
}

async function main() {
  site = await askSlides();
  at("title").textContent = site.models.join(" and ");
  at("pair-field").hidden = site.models.length < 2;
  drawList(at("list"), site.slides, (index) => showSlide(index));
  listenTo(does, site.slides);
  window.addEventListener("hashchange", () => open(readPlace(location.hash)));
  if (site.slides.length) await open(readPlace(location.hash));
  else trouble("There are no slides.");
}

// For programs that look at the page: whether what is seen is all there, and the address says where.
window.settled = () => info !== null && remembering === 0 && panes.every((pane) => pane.settled);

main().catch((error) => trouble(error.message));
