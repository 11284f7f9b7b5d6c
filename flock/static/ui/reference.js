// A file of a run: a small picture of it if it is an image, its name and size, and a button to download it.

import { send } from "./api.js";
import { button, h } from "./dom.js";
import { busyWhile } from "./notices.js";
import { saveBlob } from "./save.js";
import { sizeOf } from "./words.js";

const IMAGES = ["image/png", "image/jpeg", "image/gif", "image/webp"];
const [SIDE_PX, ROW_SIDE_PX] = [64, 24];
/** A larger image takes too long to load and to decode for a small picture. */
const MAX_BYTES = 10_000_000;
/** Small pictures by file, as data URLs: a running run is drawn again and again. */
const known = new Map();

/** The response is only ever saved or decoded as an image, so a content cannot be a page. */
const contentOf = async ({ file_id }) => (await send(`files/${file_id}`, { isStream: true })).blob();

/** A file in a row of a table has no button. */
export function fileOf(file, isInRow = false) {
  const { name, media_type } = file,
    size = Number(file.size.rawJSON ?? file.size),
    shown = name || "file";
  const save = busyWhile(async () => saveBlob(new Blob([await contentOf(file)]), shown));
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
    if (!known.has(file.file_id)) known.set(file.file_id, pictureOf(file));
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
async function pictureOf(file) {
  const blob = await contentOf(file);
  if (!IMAGES.includes(blob.type)) throw new TypeError(blob.type);
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, (2 * SIDE_PX) / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.toDataURL();
}
