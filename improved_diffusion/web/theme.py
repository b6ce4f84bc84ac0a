"""How the page looks: the system's own fonts, nothing from other hosts."""

from __future__ import annotations

import gradio as gr

_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

# Images of 16 to 64 pixels are enlarged: their pixels stay sharp.
CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
.pixels img, .pixels canvas { image-rendering: pixelated; }
.pixel-grid { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); }
.pixel-grid figure { margin: 0; }
.pixel-grid img { width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated; border-radius: 4px; }
.pixel-grid figcaption { font-size: 12px; text-align: center; color: var(--body-text-color-subdued); }
.quiet { color: var(--body-text-color-subdued); font-size: 14px; }
"""


def system_fonts(names: tuple[str, ...]) -> list[gr.themes.Font]:
    """Fonts that the browser has: none is downloaded."""
    return [gr.themes.Font(name) for name in names]


def theme() -> gr.themes.Base:
    """Calm: one accent, white cards on a light ground."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=system_fonts(_FONT),
        font_mono=system_fonts(_MONO),
    ).set(button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700")
