// One window on a slide: its tiles, a layer over them, frames around patches, a scale.

import { layerPath, tilePath } from "./ask.js";
import { drawLegend, drawScale } from "./legend.js";

const { OpenSeadragon } = window;

// OpenSeadragon puts an inline style into the page, which allows none, unless it finds one of this name: a namesake.
const namesake = document.createElementNS("urn:none", "style");
namesake.setAttribute("data-openseadragon-mobile-css", "");
document.head.append(namesake);

const OPTIONS = {
  drawer: "canvas",
  showNavigationControl: false,
  showNavigator: true,
  navigatorPosition: "TOP_RIGHT",
  navigatorSizeRatio: 0.16,
  navigatorBackground: "#fff",
  animationTime: 0.4,
  springStiffness: 10,
  visibilityRatio: 0.3,
  minZoomImageRatio: 0.5,
  maxZoomPixelRatio: 8,
  minPixelRatio: 0.6,
  maxImageCacheCount: 600,
  imageLoaderLimit: 12,
  timeout: 120000,
  gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
  preserveImageSizeOnResize: true,
};

// Tiles of steps that are any number of times smaller, in tiles of any size.
function tileSource(info, steps, path, clear) {
  const source = new OpenSeadragon.TileSource({
    width: info.width,
    height: info.height,
    tileWidth: 512,
    tileHeight: 512,
    minLevel: 0,
    maxLevel: steps.length - 1,
  });
  source.getLevelScale = (level) => 1 / steps[level].downsample;
  source.getTileWidth = (level) => steps[level].tileWidth;
  source.getTileHeight = (level) => steps[level].tileHeight;
  source.getNumTiles = (level) => new OpenSeadragon.Point(steps[level].columns, steps[level].rows);
  source.getTileUrl = path;
  source.hasTransparency = () => clear;
  return source;
}

export class Pane {
  constructor(onMove, onTrouble) {
    this.element = document.createElement("div");
    this.element.className = "pane";
    const [picture, title, scale, legend] = ["div", "h2", "div", "div"].map((kind) => document.createElement(kind));
    picture.className = "picture";
    scale.className = "scale";
    legend.className = "legend";
    Object.assign(this, { picture, title, scale, legend, onMove, onTrouble, laying: 0 });
    this.element.append(picture, title, scale, legend);
  }

  // Once it stands in the page: before, it has no size.
  start() {
    this.viewer = OpenSeadragon({ ...OPTIONS, element: this.picture });
    this.viewer.canvas.setAttribute("role", "application");
    this.viewer.canvas.setAttribute("aria-label", "Slide: arrow keys move, plus and minus zoom");
    this.viewer.innerTracker.keyHandler = null; // the page has its own keys
    this.viewer.innerTracker.keyDownHandler = null;
    this.viewer.addHandler("viewport-change", () => this.moved());
    this.viewer.addHandler("resize", () => this.moved());
    this.viewer.addHandler("tile-load-failed", ({ message }) => this.onTrouble(message));
  }

  show(tag, slide, info) {
    Object.assign(this, { tag, slide, info, over: null });
    this.viewer.close();
    this.viewer.clearOverlays();
    return new Promise((resolve) => {
      this.viewer.addOnceHandler("open", resolve);
      this.viewer.open(tileSource(info, info.steps, tilePath(tag, slide), false));
    });
  }

  // `layer`: as the server lists it, with its number; null: none.
  async lay(layer, opacity) {
    const old = this.over;
    this.over = null;
    if (old) this.viewer.world.removeItem(old);
    drawLegend(this.legend, layer?.title ?? "", layer?.legend ?? null, opacity);
    const wanted = (this.wanted = Symbol("the layer chosen last"));
    if (!layer) return;
    const source = tileSource(this.info, this.info.layerSteps, layerPath(this.tag, this.slide, layer.number), true);
    this.laying += 1;
    const item = await new Promise((success) =>
      this.viewer.addTiledImage({ tileSource: source, opacity, success: (event) => success(event.item) }),
    );
    this.laying -= 1;
    if (this.wanted === wanted) this.over = item;
    else this.viewer.world.removeItem(item); // another one was chosen meanwhile
  }

  setOpacity(opacity) {
    this.over?.setOpacity(opacity);
    const bar = this.legend.querySelector(".bar");
    if (bar) bar.firstChild.style.opacity = opacity; // the bar shows what is seen
  }

  name(text) {
    const words = document.createElement("span");
    words.textContent = text;
    this.title.replaceChildren(...(text ? [words] : []));
  }

  // Frames of a class around squares [x, y, size] in level-0 px, instead of those there were.
  frame(kind, squares) {
    for (const old of this.picture.querySelectorAll(`.${kind}`)) this.viewer.removeOverlay(old);
    for (const [x, y, size] of squares) {
      const element = document.createElement("div");
      element.className = kind;
      this.viewer.addOverlay({ element, location: this.rectangle(x, y, size, size) });
    }
  }

  rectangle(x, y, width, height) {
    const unit = this.info.width;
    return new OpenSeadragon.Rect(x / unit, y / unit, width / unit, height / unit);
  }

  // Centre in level-0 px, and level-0 px per px of the screen.
  get view() {
    const { viewport } = this.viewer;
    const centre = viewport.getCenter(false).times(this.info.width);
    return { x: centre.x, y: centre.y, z: this.perPixel(false) };
  }

  perPixel(now) {
    const { viewport } = this.viewer;
    return this.info.width / (viewport.getZoom(now) * viewport.getContainerSize().x);
  }

  go({ x, y, z }, now = false) {
    const { viewport } = this.viewer;
    const zoom = this.info.width / (z * viewport.getContainerSize().x);
    viewport.zoomTo(zoom, null, now);
    viewport.panTo(new OpenSeadragon.Point(x / this.info.width, y / this.info.width), now);
    if (now) this.moved(); // no event tells of a jump
  }

  goWhole(now = false) {
    this.viewer.viewport.fitBounds(this.rectangle(...this.info.bounds), now);
    if (now) this.moved();
  }

  // By shares of the window; a zoom of 1 stays as it is.
  nudge(right, down, zoom) {
    const { viewport } = this.viewer;
    const seen = viewport.getBounds(false);
    if (zoom !== 1) viewport.zoomBy(zoom);
    viewport.panBy(new OpenSeadragon.Point(right * seen.width, down * seen.height));
    viewport.applyConstraints();
  }

  moved() {
    if (!this.info || !this.viewer.isOpen()) return;
    drawScale(this.scale, this.perPixel(true), this.info.mpp);
    this.onMove(this);
  }

  // Whether nothing moves, no layer is on its way and all tiles of what is seen are drawn.
  get settled() {
    const { viewer } = this;
    const items = Array.from({ length: viewer.world.getItemCount() }, (_, index) => viewer.world.getItemAt(index));
    return items.length > 0 && this.laying === 0 && !viewer.isAnimating() && items.every((item) => item.getFullyLoaded());
  }

  end() {
    this.viewer.destroy();
    this.element.remove();
  }
}
