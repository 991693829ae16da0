// The list of slides, and the panel that says what is known of one.

export const number = (value) => (Math.abs(value) >= 0.001 || value === 0 ? value.toFixed(3) : value.toExponential(1));

const interval = ({ low, high, interval: kind }) =>
  low === null || high === null ? "" : ` (${kind}: ${number(low)} to ${number(high)})`;

const meant = {
  calibrated: (tested) =>
    `calibrated: of slides with such an output, the share that has the class lies there, by the test of ${tested} ` +
    "patients. It tells of the output and is no confidence interval around it: that may lie outside.",
  "95%": (tested) =>
    `95%: of 100 new slides like those of the test, of ${tested} patients, the label lies there for 95. ` +
    "It is as wide for every slide.",
};

export const meaning = ({ low, interval: kind, tested }) =>
  low === null || !tested || !(kind in meant) ? "" : meant[kind](tested);

export const toldText = (told) => `${told.name} ${number(told.value)}${interval(told)}`;

function item(slide, index, onChoose) {
  const row = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.slide = index;
  button.append(text("span", slide.id, "name"));
  if (slide.label !== null) button.append(text("span", `label ${slide.label}`, "line"));
  for (const told of slide.told) {
    const line = text("span", toldText(told), "line");
    line.title = meaning(told);
    button.append(line);
  }
  if (slide.reason !== null) button.append(text("span", slide.reason, "line bad"));
  button.addEventListener("click", () => onChoose(index));
  row.append(button);
  return row;
}

export function drawList(element, slides, onChoose) {
  element.replaceChildren(...slides.map((slide, index) => item(slide, index, onChoose)));
}

export function markCurrent(element, index) {
  for (const button of element.querySelectorAll("button")) {
    const current = button.dataset.slide === String(index);
    button.toggleAttribute("aria-current", false);
    if (current) {
      button.setAttribute("aria-current", "true");
      button.scrollIntoView({ block: "nearest" });
    }
  }
}

export function filterList(element, slides, wanted) {
  const words = wanted.toLowerCase().split(/\s+/).filter(Boolean);
  [...element.children].forEach((row, index) => {
    const { id, label, reason } = slides[index];
    const known = `${id} ${label ?? ""} ${reason ?? ""}`.toLowerCase();
    row.hidden = !words.every((word) => known.includes(word));
  });
}

export function drawPanel(element, slide, models, info, patch) {
  const parts = [text("h2", slide.id), facts(slide, models, info)];
  for (const sentence of info?.sentences ?? []) parts.push(text("p", sentence));
  (info?.models ?? []).forEach((model, index) => {
    const told = index === 0 && info.sentences.length > 0; // by what predicted it
    if (model === null || model.mass === null || told) return;
    const whose = models.length > 1 ? `${models[index]}: ` : "";
    const share = (100 * model.mass).toFixed(model.mass > 0.995 || model.mass < 0.1 ? 1 : 0);
    parts.push(
      text("p", `${whose}${share}% of the attention is in the ${model.selected} selected of ${model.count} patches.`),
    );
  });
  if (patch) parts.push(text("h2", patch.title), list(patch.rows));
  element.replaceChildren(...parts);
}

function facts(slide, models, info) {
  const rows = slide.label === null ? [] : [["label", slide.label]];
  const both = slide.other !== null;
  for (const told of slide.told)
    rows.push([both ? `${told.name}, ${models[0]}` : told.name, number(told.value) + interval(told)]);
  for (const told of slide.other ?? []) rows.push([`${told.name}, ${models[1]}`, number(told.value) + interval(told)]);
  rows.push(...Object.entries(slide.facts));
  if (info) rows.push(["size", `${info.width} \u00d7 ${info.height} px`]);
  if (info)
    rows.push(["resolution", info.mpp === null ? "not known" : `${Number(info.mpp.toPrecision(4))} \u00b5m/px`]);
  return list(rows);
}

function list(rows) {
  const found = document.createElement("dl");
  for (const [what, value] of rows) found.append(text("dt", what), text("dd", value));
  return found;
}

function text(kind, words, name = "") {
  const element = document.createElement(kind);
  element.textContent = words;
  if (name) element.className = name;
  return element;
}
