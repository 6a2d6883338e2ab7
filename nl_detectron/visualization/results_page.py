"""The page of ``tools/show_results.py``: one file that needs no other."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from string import Template

import numpy as np
from PIL import Image

QUALITY = 88  # of the JPEGs

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
  :root { --text: #1c1e21; --faint: #5f6570; --back: #fff; --line: #dcdfe4; }
  @media (prefers-color-scheme: dark) {
    :root { --text: #e6e8eb; --faint: #9aa1ac; --back: #15171a; --line: #33373d; }
  }
  body { margin: 0 auto; padding: 1rem; max-width: 90rem; color: var(--text);
         background: var(--back); font: 1rem/1.5 system-ui, sans-serif; }
  h1 { font-size: 1.4rem; margin: 0; }
  h2 { font-size: 1rem; margin: 0; }
  h1, h2, p { overflow-wrap: anywhere; }
  p, figcaption { color: var(--faint); margin: 0.2rem 0 0.6rem; }
  figcaption { margin: 0; font-size: 0.9rem; }
  section { border-top: 1px solid var(--line); margin-top: 1.2rem; padding-top: 0.8rem; }
  .panels { display: grid; gap: 0.8rem;
            grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
  figure { margin: 0; min-width: 0; }
  img { display: block; width: 100%; height: auto; }
</style>
</head>
<body>
<main>
<h1>$title</h1>
<p>$summary</p>
$sections
</main>
</body>
</html>
""")

SECTION = Template("""<section>
<h2>$title</h2>
<p>$note</p>
<div class="panels">
$panels
</div>
</section>""")

PANEL = Template("""<figure>
<figcaption>$caption</figcaption>
<img src="$source" width="$width" height="$height" alt="$alt">
</figure>""")


@dataclass(frozen=True)
class Panel:
    """A picture, (height, width, 3) RGB, its caption, and what it shows, in words."""

    picture: np.ndarray
    caption: str
    alt: str


@dataclass(frozen=True)
class Section:
    """The panels of one image."""

    title: str
    note: str
    panels: Sequence[Panel]


def page(title: str, summary: str, sections: Sequence[Section]) -> str:
    """The HTML, with all pictures inside."""
    texts = [
        SECTION.substitute(
            title=escape(section.title),
            note=escape(section.note),
            panels="\n".join(map(_panel, section.panels)),
        )
        for section in sections
    ]
    return PAGE.substitute(title=escape(title), summary=escape(summary), sections="\n".join(texts))


def _panel(panel: Panel) -> str:
    file = io.BytesIO()
    Image.fromarray(panel.picture).save(file, "JPEG", quality=QUALITY)
    data = base64.b64encode(file.getvalue()).decode()
    height, width = panel.picture.shape[:2]
    return PANEL.substitute(
        caption=escape(panel.caption),
        alt=escape(panel.alt),
        source=f"data:image/jpeg;base64,{data}",
        width=width,
        height=height,
    )
