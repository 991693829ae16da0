// Keys, as one table: what they are called and what they do.

export function listen(bindings, table) {
  table.replaceChildren(...bindings.map(row));
  document.addEventListener("keydown", (event) => {
    const { target } = event;
    const writes = target instanceof HTMLInputElement && target.type === "search";
    const turns = event.key.startsWith("Arrow") && target instanceof Element && target.matches("select, input");
    if (event.ctrlKey || event.metaKey || event.altKey || writes || turns || document.querySelector("dialog[open]"))
      return;
    const found = bindings.find(({ keys }) => keys.includes(event.key));
    if (!found) return;
    event.preventDefault();
    found.does(event.key);
  });
}

function row({ shown, what }) {
  const line = document.createElement("tr");
  const [left, right] = [document.createElement("td"), document.createElement("td")];
  for (const key of shown) {
    const cap = document.createElement("kbd");
    cap.textContent = key;
    left.append(cap, " ");
  }
  right.textContent = what;
  line.append(left, right);
  return line;
}
