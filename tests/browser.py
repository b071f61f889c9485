"""A page in a headless Chromium: how it lies in a phone's width, and whether its words can be told from what is behind them."""

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
# The page stands in a frame, which is as narrow as asked for, and light or dark; a window has a least width. The frame's parent
# looks into it: no script of the page itself would run.
WATCHER = """<!doctype html><iframe id="page" width="{width}" height="900" style="border: 0; color-scheme: {scheme}"
  srcdoc="{page}"></iframe><pre id="found"></pre>
<script>
function channels(colour) {{ return colour.match(/[\\d.]+/g).map(Number); }}
function luminance(colour) {{
  const parts = channels(colour).slice(0, 3).map(part => part / 255);
  const linear = parts.map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}}
document.getElementById("page").onload = event => {{
  const view = event.target.contentWindow, page = view.document, root = page.documentElement;
  const behind = luminance(view.getComputedStyle(page.body).backgroundColor), words = [];
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {{
    const node = walker.currentNode, owner = node.parentElement, style = view.getComputedStyle(owner);
    if (!node.data.trim() || owner.closest(".faint")) continue;
    const own = luminance(owner.namespaceURI.endsWith("svg") ? style.fill : style.color), box = owner.getBoundingClientRect();
    words.push({{ text: node.data.trim(), size: parseFloat(style.fontSize), width: box.width, height: box.height,
      contrast: (Math.max(own, behind) + 0.05) / (Math.min(own, behind) + 0.05) }});
  }}
  document.getElementById("found").textContent =
    JSON.stringify({{ width: root.scrollWidth, room: view.innerWidth, background: behind, words }});
}};
</script>"""


def program() -> str:
    """The browser here. Skips the calling test where there is none, unless LORA_KERNELS_BROWSER says that there has to be."""
    found = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if found is None and "LORA_KERNELS_BROWSER" not in os.environ:
        pytest.skip(f"there is no browser: none of {', '.join(PROGRAMS)}")
    assert found, f"LORA_KERNELS_BROWSER is set, and there is none of {', '.join(PROGRAMS)}"
    return found


def seen(page: str, folder: Path, width: int, scheme: str) -> dict[str, Any]:
    """Of a page of `width` pixels, light or dark: its own width, its room, and its texts with size, box and contrast."""
    file = folder / "watched.html"
    file.write_text(WATCHER.format(width=width, scheme=scheme, page=escape(page)), encoding="utf-8")
    options = [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", file.as_uri()]
    command = [program(), "--headless", "--no-sandbox", *QUIET, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(unescape(found[1]))
