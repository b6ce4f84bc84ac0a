"""How the page looks: the system's own fonts, nothing from other hosts."""

from __future__ import annotations

import gradio as gr

_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

# Images of 16 to 64 pixels are enlarged: their pixels stay sharp. Places for images and messages keep their height.
CSS = """
.gradio-container { width: 100%; max-width: 1240px !important; margin: 0 auto !important; overflow: clip !important; }
.pixels img, .pixels canvas { image-rendering: pixelated; }
.pixels .image-frame img, .pixels .image-container img { width: 100%; height: 100%; object-fit: contain; }
.pixel-grid { display: grid; gap: 8px; grid-template-columns: repeat(4, minmax(0, 1fr)); padding: 10px;
  border: 1px solid var(--border-color-primary); border-radius: var(--block-radius); }
.pixel-grid figure { margin: 0; }
.pixel-grid img, .pixel-grid .blank { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  image-rendering: pixelated; border-radius: 6px; background: var(--background-fill-secondary); }
.pixel-grid figcaption { font-size: 12px; text-align: center; color: var(--body-text-color-subdued); }
.empty { display: grid; place-items: center; min-height: 180px; padding: 16px; text-align: center;
  border: 1px dashed var(--border-color-primary); border-radius: var(--block-radius);
  color: var(--body-text-color-subdued); }
.status { min-height: 44px; display: flex; flex-direction: column; justify-content: center; gap: 4px; }
.status progress { width: 100%; height: 8px; accent-color: var(--primary-600); }
.status.bad { color: #b91c1c; }
.dark .status.bad { color: #fca5a5; }
.work > .ask, .work > .got, .work > .more { min-width: 0; }
@media (min-width: 800px) {
  .work { display: grid !important; grid-template-columns: 2fr 3fr; grid-template-rows: auto 1fr; gap: 16px; }
  .work > .ask { grid-area: 1 / 1; } .work > .got { grid-area: 1 / 2 / 3 / 3; } .work > .more { grid-area: 2 / 1; }
  .got { position: sticky; top: 12px; align-self: start; }
}
.gradio-container, .gradio-container .app, .gradio-container .contain { min-width: 0 !important; max-width: 100vw; }
.gradio-container .app > .wrap, .tab-wrapper, .work, .contain > .column { min-width: 0 !important; }
@media (max-width: 640px) { .gradio-container .app { padding: 12px !important; width: 100vw !important; }
  .tab-container button { padding-left: 8px !important; padding-right: 8px !important; } }
.snug > .form { align-items: end; }
.html-container.padding { padding: 0 !important; }
.pixels .grid-wrap, .pixels .gallery-container { min-height: 0 !important; height: auto !important; }
.pixels .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
.pixels .caption-label { font-size: 11px; padding: 0 4px; }
.pixels .grid-container .thumbnail-item { min-width: 0 !important; width: 100% !important; }
.quiet { color: var(--body-text-color-subdued); font-size: 14px; margin: 0 0 4px; }
.bar button, .picker button { min-height: 40px; align-self: center; }
.cm-editor { font-size: 13px; }
.sharp img { image-rendering: pixelated; }
#train-previews .grid-wrap, #evaluate-pictures .grid-wrap { max-height: none !important; height: auto !important; }
#train-previews, #evaluate-pictures { height: auto !important; max-height: none !important; }
input[role="combobox"] { text-overflow: ellipsis; padding-right: 24px !important; }
#dice, #train-stop, #train-resume { align-self: center; min-height: 40px; }
@media (max-width: 640px) {
  .pixel-grid, .pixels .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; } }
.curve { contain: inline-size; }
.report { overflow-x: auto; }
.report td, .report th { word-break: normal; overflow-wrap: normal; min-width: 70px; }
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
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        button_large_text_size="*text_md",
        button_small_text_size="*text_sm",
    )
