// The scale bar and the colour bar.

const ROUND = [1, 2, 5];

// The largest of 1, 2, 5, 10, 20 ... that is not over `most`.
export function roundLength(most) {
  const power = 10 ** Math.floor(Math.log10(most));
  return Math.max(...ROUND.map((step) => step * power).filter((length) => length <= most));
}

export function lengthText(length, inMicrons) {
  if (!inMicrons) return `${length} px`;
  return length < 1000 ? `${Number(length.toPrecision(3))} \u00b5m` : `${length / 1000} mm`;
}

// `perPixel`: level-0 px per px of the screen.
export function drawScale(element, perPixel, mpp) {
  const unit = perPixel * (mpp ?? 1);
  const length = roundLength(160 * unit);
  const bar = document.createElement("div");
  bar.className = "bar";
  bar.style.width = `${length / unit}px`;
  const words = document.createElement("span");
  const seen =
    mpp === null ? "" : `  \u00b7  ${Number(unit.toPrecision(3))} \u00b5m/px, about ${about(10 / unit)}\u00d7`;
  words.textContent = lengthText(length, mpp !== null) + seen;
  element.replaceChildren(bar, words);
}

// Magnification as microscopes name it: 10x is 1 micron a px.
const about = (times) => (times >= 10 ? Math.round(times) : Number(times.toPrecision(2)));

export function drawLegend(element, title, legend, opacity) {
  element.hidden = legend === null;
  if (legend === null) return;
  const bar = document.createElement("div");
  bar.className = "bar";
  const colours = document.createElement("div");
  colours.style.backgroundImage = `linear-gradient(to right, ${legend.colours.join(", ")})`;
  colours.style.opacity = opacity;
  bar.append(colours);
  const marks = document.createElement("div");
  marks.className = "marks";
  for (const { at, text } of spaced(legend.marks)) {
    const mark = document.createElement("span");
    mark.textContent = text;
    mark.style.left = `${100 * at}%`;
    if (at > 0.9) mark.className = "last";
    marks.append(mark);
  }
  element.replaceChildren(line("b", title), bar, marks, line("div", legend.unit), line("div", legend.stated, "stated"));
}

// Marks that are too near the one before are left out.
function spaced(marks) {
  let last = -1;
  return marks.filter(({ at }) => {
    const far = at - last >= 0.1;
    if (far) last = at;
    return far;
  });
}

function line(kind, text, name = "") {
  const element = document.createElement(kind);
  element.textContent = text;
  element.className = name;
  return element;
}
