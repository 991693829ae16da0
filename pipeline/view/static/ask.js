// What the server is asked. Its words of refusal become the error's.

async function answer(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

export const askSlides = () => answer("/slides");
export const askSlide = (tag, slide) => answer(`/${tag}/${slide}`);
export const tilePath = (tag, slide) => (step, column, row) => `/${tag}/${slide}/tile/${step}/${column}/${row}`;
export const layerPath = (tag, slide, layer) => (step, column, row) =>
  `/${tag}/${slide}/layer/${layer}/${step}/${column}/${row}`;
