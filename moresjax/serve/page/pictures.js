// Images as data URIs, drawn on canvases: the page's security policy lets no `data:` image load.

/** The bytes behind a `data:` URI as a blob. */
export function toBlob(uri) {
  const comma = uri.indexOf(",");
  const type = uri.slice(5, comma).split(";")[0];
  const text = atob(uri.slice(comma + 1));
  return new Blob([Uint8Array.from(text, (letter) => letter.charCodeAt(0))], { type });
}

/** A file as a `data:` URI. */
export function toUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

/** A file that a reader of the page chose, as `{name, uri}`; an error tells why it is none. */
export async function readImage(file) {
  const name = file.name || "pasted.png";
  if (file.type && !file.type.startsWith("image/")) {
    throw new Error(`${name} is not an image: choose a PNG, JPEG, WebP or GIF file.`);
  }
  const uri = await toUri(file);
  try {
    (await createImageBitmap(file)).close();
  } catch {
    throw new Error(`${name} is broken, or not an image that this browser can read.`);
  }
  return { name, uri };
}

const bitmaps = new Map();

/** The bitmap of a `data:` URI; the last few are kept. */
export async function bitmap(uri) {
  if (!bitmaps.has(uri)) {
    bitmaps.set(uri, createImageBitmap(toBlob(uri)));
    if (bitmaps.size > 32) bitmaps.delete(bitmaps.keys().next().value);
  }
  return bitmaps.get(uri);
}

/** A canvas that shows an image with its longer side `side` pixels long. */
export function thumbnail(uri, label, side) {
  const canvas = document.createElement("canvas");
  canvas.className = "thumbnail";
  canvas.width = canvas.height = side;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  bitmap(uri)
    .then((image) => {
      const scale = side / Math.max(image.width, image.height);
      canvas.width = Math.max(1, Math.round(image.width * scale));
      canvas.height = Math.max(1, Math.round(image.height * scale));
      const context = canvas.getContext("2d");
      context.imageSmoothingEnabled = scale < 1;
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
    })
    .catch(() => canvas.classList.add("broken"));
  return canvas;
}
