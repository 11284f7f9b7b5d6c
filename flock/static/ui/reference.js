// A file of a run: a small picture of it if it is an image, its name and size, and a button to download it.

import { viewSignal } from "./address.js";
import { send } from "./api.js";
import { button, h } from "./dom.js";
import { busyWhile } from "./notices.js";
import { saveBlob } from "./save.js";
import { sizeOf } from "./words.js";

const IMAGES = ["image/png", "image/jpeg", "image/gif", "image/webp"];
const [SIDE_PX, ROW_SIDE_PX] = [64, 24];
/** A larger image takes too long to load and to decode for a small picture. */
const MAX_BYTES = 10_000_000;
const MAX_PIXELS = 50_000_000;
/** The last picture of each lane. A lane loads one after the other, since a browser has only six connections per host. */
const lanes = [null, null, null];
let started = 0;
/** Small pictures by file, as data URLs: a running run is drawn again and again. */
const known = new Map();

/** The response is only ever saved or decoded as an image, so a content cannot be a page. */
const contentOf = async ({ file_id }, signal) => (await send(`files/${file_id}`, { isStream: true, signal })).blob();

/** A file in a row of a table has no button. */
export function fileOf(file, isInRow = false) {
  const { name, media_type } = file,
    size = Number(file.size.rawJSON ?? file.size),
    shown = name || "file";
  const save = busyWhile(async () => saveBlob(new Blob([await contentOf(file, viewSignal())]), shown));
  return h(
    "span.file",
    IMAGES.includes(media_type) && size <= MAX_BYTES && thumbnail(file, shown, isInRow ? ROW_SIDE_PX : SIDE_PX),
    h("span.text", shown),
    h("span.quiet", sizeOf(size)),
    !isInRow && button("Download", save, { class: "small", "aria-label": `Download ${shown}` }),
  );
}

/** A picture of a fixed size, which is loaded when it is visible. It disappears if there is none. */
function thumbnail(file, alt, side) {
  const image = h("img", { alt, width: side, height: side });
  const load = async () => {
    if (known.size > 200) known.clear();
    if (!known.has(file.file_id)) {
      const signal = viewSignal(),
        lane = started++ % lanes.length;
      lanes[lane] = Promise.allSettled([lanes[lane]]).then(() => pictureOf(file, signal));
      known.set(file.file_id, lanes[lane]);
    }
    try {
      image.src = await known.get(file.file_id);
    } catch {
      known.delete(file.file_id);
      image.remove();
    }
  };
  new IntersectionObserver(([{ isIntersecting }], observer) => {
    if (!isIntersecting) return;
    observer.disconnect();
    load();
  }).observe(image);
  return image;
}

/** Return a small copy of an image as a data URL. What is no image fails, whatever its record says. */
async function pictureOf(file, signal) {
  const blob = await contentOf(file, signal);
  if (!IMAGES.includes(blob.type)) throw new TypeError(blob.type);
  const reader = new FileReader();
  reader.readAsDataURL(blob);
  await eventOf(reader);
  const image = new Image();
  image.src = reader.result;
  await eventOf(image); // it has its size, and is decoded when it is drawn
  const sides = [image.naturalWidth, image.naturalHeight];
  if (sides[0] * sides[1] > MAX_PIXELS) throw new RangeError("too many pixels");
  const scale = Math.min(1, (2 * SIDE_PX) / Math.max(...sides));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = sides.map((side) => Math.max(1, Math.round(side * scale)));
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL();
}

const eventOf = (target) => new Promise((onload, onerror) => Object.assign(target, { onload, onerror }));
