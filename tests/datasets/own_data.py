"""Small folders as people have them."""

import numpy as np
from PIL import Image


def photo(path, seed, size=(40, 30)):
    """A photo like no other: a gradient under a coloured block."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[1], : size[0]]
    image_u8 = np.stack([x * 5, y * 7, (x + y) * 3], -1).astype(np.uint8)
    top, left = rng.integers(0, size[1] // 2), rng.integers(0, size[0] // 2)
    image_u8[top : top + 12, left : left + 12] = rng.integers(0, 255, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_u8).save(path)
    return path


def class_folders(root, classes=("cat", "golden_retriever"), count=8):
    """root/CLASS/N.png."""
    for i, name in enumerate(classes):
        for n in range(count):
            photo(root / name / f"{n}.png", 100 * i + n)
    return root


def captioned(root, count=12):
    """root/N.png and captions.csv."""
    lines = ["file,caption"]
    for n in range(count):
        photo(root / f"{n}.png", n)
        lines.append(f'{n}.png,"a {"red" if n % 2 else "blue"} block, on a wall"')
    (root / "captions.csv").write_text("\n".join(lines) + "\n")
    return root


def videos(root, count=3, frames=40, size=48):
    """root/clipN.mp4, a block moving."""
    import av

    root.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        with av.open(str(root / f"clip{n}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
            for t in range(frames):
                image_u8 = np.full((size, size, 3), 40 * n, np.uint8)
                image_u8[10:20, t % 30 : t % 30 + 10] = (255, 200, 40 * n)
                frame = av.VideoFrame.from_ndarray(image_u8, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return root
