// Keys, buttons and fields, and what each of them does.

import { listen } from "./keys.js";
import { filterList } from "./list.js";

const at = (id) => document.getElementById(id);
const STEP = 0.2; // of the window
const MOVES = {
  ArrowLeft: [-STEP, 0, 1],
  ArrowRight: [STEP, 0, 1],
  ArrowUp: [0, -STEP, 1],
  ArrowDown: [0, STEP, 1],
  "+": [0, 0, 1.5],
  "=": [0, 0, 1.5],
  "-": [0, 0, 1 / 1.5],
};
const ARROWS = ["\u2190", "\u2192", "\u2191", "\u2193"];

const key = (shown, what, does, keys = shown) => ({ keys, shown, what, does });

const bindings = (does) => [
  key(["n"], "next patch by attention", does.next),
  key(["p"], "previous patch", does.previous),
  key(["j"], "next slide", () => does.nextSlide(1)),
  key(["k"], "previous slide", () => does.nextSlide(-1)),
  key(["l", "L"], "next, previous layer", (pressed) => does.turnLayer(pressed === "l" ? 1 : -1)),
  key(["o"], "layer away and back", does.hideLayer),
  key(["]", "["], "layer denser, clearer", (pressed) => does.denser(pressed === "]" ? 0.1 : -0.1)),
  key(["s"], "frames around selected patches", does.turnFrames),
  key(["c"], "two models side by side", does.turnPair),
  key(["h"], "whole slide", does.whole),
  key([...ARROWS, "+", "-"], "move, zoom", (pressed) => does.nudge(...MOVES[pressed]), Object.keys(MOVES)),
  key(["?"], "these keys", () => at("keys").showModal()),
];

export function listenTo(does, slides) {
  listen(bindings(does), at("keys-table"));
  at("filter").addEventListener("input", ({ target }) => filterList(at("list"), slides, target.value));
  at("layer").addEventListener("change", ({ target }) => does.setLayer(target.value));
  at("opacity").addEventListener("input", ({ target }) => does.setOpacity(target.value / 100));
  at("frames").addEventListener("change", ({ target }) => does.setFrames(target.checked));
  at("pair").addEventListener("change", ({ target }) => does.setPair(target.checked));
  at("next").addEventListener("click", does.next);
  at("previous").addEventListener("click", does.previous);
  at("whole").addEventListener("click", does.whole);
  at("help").addEventListener("click", () => at("keys").showModal());
  at("tools").addEventListener("submit", (event) => event.preventDefault());
}
