"""The page of `attncap demo`, which captions uploaded pictures and shows the attention. Needs gradio."""

import atexit
import html
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .captioner import Captioner
from .html_page import render_frame
from .images import ImageError, load_image

if TYPE_CHECKING:
    import gradio

TITLE = "Image captions with attention"
MAX_FILE_BYTES = 32 * 2**20
MAX_FILES = 64
KEPT_SECONDS, CHECK_SECONDS = 300, 60  # an upload is deleted after KEPT_SECONDS; gradio looks every CHECK_SECONDS
MAX_BEAMS, MAX_WORDS, DEFAULT_WORDS = 10, 50, 21
FRAME_HEIGHT = 640  # CSS pixels
EXAMPLES = ("chelsea.png", "coffee.png", "astronaut.png", "motorcycle_left.png", "rocket.jpg")
COLUMNS = ["file", "caption", "confidence", "error"]
# What the page may load: only what this server sends. gradio's page has inline scripts and compiles templates.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; form-action 'self'"
)


def build_demo(captioner: Captioner) -> "gradio.Blocks":
    """The page and its API: `/caption` for one picture, `/caption_files` for several.

    Uploads are stored in a temporary folder that only this user can read. gradio deletes each after `KEPT_SECONDS`, and the folder
    is deleted at exit. gradio sends no usage data.

    Args:
        captioner: any captioner, also one of an exported folder.

    Raises:
        ImportError: gradio is not installed.
    """
    gr = import_gradio()
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(CHECK_SECONDS, KEPT_SECONDS)) as demo:
        gr.Markdown(f"# {TITLE}")
        with gr.Tab("One picture"):
            _add_picture(gr, captioner)
        with gr.Tab("Several pictures"):
            _add_files(gr, captioner)
    return demo


def launch_demo(demo: "gradio.Blocks", host: str = "127.0.0.1", port: int | None = None, **options: Any) -> str:
    """Serves the page and returns its address. It does not wait: call `demo.block_thread()` for that.

    Args:
        host: the address to listen on. By default, only this machine can open the page.
        port: default: the first free one from 7860.
        options: further arguments of gradio's `launch`.

    Raises:
        OSError: the port is in use.
    """
    gr = import_gradio()
    from starlette.middleware import Middleware

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    _, address, _ = demo.queue(max_size=32, default_concurrency_limit=1).launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        max_file_size=MAX_FILE_BYTES,
        footer_links=["api"],
        run_history=False,
        enable_monitoring=False,
        theme=gr.themes.Default(**fonts),
        app_kwargs={"middleware": [Middleware(_Policy)]},
        **options,
    )
    return address


def import_gradio() -> Any:
    """gradio, without usage data and with a folder for uploads that is deleted at exit; raises an ImportError without gradio."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if "GRADIO_TEMP_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="attncap-demo-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["GRADIO_TEMP_DIR"] = folder
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f'The demo needs gradio: pip install "hf_attncap[demo]" ({error})') from error
    return gradio


class _Policy:
    """Adds the Content-Security-Policy to each page."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)


def _add_settings(gr: Any, captioner: Captioner) -> list[Any]:
    """The inputs that `_settings` takes."""
    beams = gr.Slider(1, MAX_BEAMS, captioner.engine.default_beams, step=1, label="Beams")
    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: beam search. Above 0: sampling, without beams.")
    length = gr.Slider(1, MAX_WORDS, DEFAULT_WORDS, step=1, label="Most words")
    prompt = gr.Textbox("", label="Prompt", info="The beginning of the caption.", max_lines=1)
    return [beams, temperature, length, prompt]


def _settings(beams: float, temperature: float, length: float, prompt: str | None) -> dict[str, Any]:
    """Arguments of `Captioner.caption` from the settings of the page."""
    sampling = (
        {"do_sample": True, "temperature": float(temperature), "num_beams": 1} if temperature > 0 else {"num_beams": int(beams)}
    )
    return {**sampling, "max_new_tokens": int(length), "prompt": (prompt or "").strip() or None}


def _add_picture(gr: Any, captioner: Captioner) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            picture = gr.Image(type="filepath", image_mode=None, label="Picture", sources=["upload", "clipboard"], buttons=[])
            picture.preprocess = _as_uploaded
            button = gr.Button("Caption", variant="primary")
            with gr.Accordion("Settings", open=False):
                settings = _add_settings(gr, captioner)
                count = gr.Slider(1, 5, 3, step=1, label="Captions", info="Beam search gives at most as many as it has beams.")
                importance = gr.Checkbox(True, label="Importance maps (slower)")
            examples = gr.Column()
        with gr.Column(scale=3, min_width=320):
            caption = gr.Textbox(label="Caption", lines=2, interactive=False)
            view = gr.HTML(label="Attention", min_height=FRAME_HEIGHT)
            details = gr.JSON(label="Details", visible=False)
    inputs, outputs = [picture, *settings, count, importance], [caption, view, details]
    run = partial(_caption, gr, captioner)
    button.click(run, inputs, outputs, api_name="caption", concurrency_id="model")
    picture.upload(run, inputs, outputs, api_visibility="private", concurrency_id="model")
    if files := _example_files():
        defaults = [item.value for item in inputs[1:]]
        with examples:
            gr.Examples(
                files, picture, outputs, fn=lambda image: run(image, *defaults), run_on_click=True, api_visibility="private"
            )


def _caption(
    gr: Any,
    captioner: Captioner,
    picture: Any,
    beams: float,
    temperature: float,
    length: float,
    prompt: str | None,
    count: float,
    importance: bool,
) -> tuple[str, str, dict[str, Any]]:
    """Caption, view and details of an upload; raises a `gradio.Error` with one sentence if it has no caption."""
    if picture is None:
        raise _error(gr, "Choose a picture first.")
    settings = _settings(beams, temperature, length, prompt)
    count = int(count) if settings.get("do_sample") else min(int(count), int(beams))
    try:
        image = load_image(Path(picture.path) if picture.path else picture.url)
        result = captioner.caption(image, num_return_sequences=count, explain=bool(importance), **settings)
    except ValueError as error:  # ImageError too
        raise _error(gr, _message(error, picture)) from error
    details = {key: value for key, value in result.to_dict().items() if key not in ("attention", "importance")}
    return result.text, render_frame(result, height=FRAME_HEIGHT), details


def _as_uploaded(payload: Any) -> Any:
    """Replaces gradio's `preprocess`, which decodes pictures without this package's checks and leaves an empty file per upload.

    gradio calls it after it has checked that the path of `payload` is that of an upload.
    """
    return payload


def _name(upload: Any) -> str:
    """The name of the file on the user's machine."""
    return upload.orig_name or Path(upload.path or "picture").name


def _message(error: Exception, upload: Any) -> str:
    return str(error).replace(str(upload.path), _name(upload))


def _error(gr: Any, message: Exception | str) -> Exception:
    """A `gradio.Error`. gradio shows messages as HTML, so they are escaped: they may contain the name of a file."""
    return gr.Error(html.escape(str(message)), print_exception=False)


def _example_files() -> list[str]:
    """Photographs of scikit-image, if it is installed."""
    try:
        import skimage
    except ImportError:
        return []
    folder = Path(skimage.__file__).parent / "data"
    return [str(folder / name) for name in EXAMPLES if (folder / name).is_file()]


def _add_files(gr: Any, captioner: Captioner) -> None:
    files = gr.File(file_count="multiple", label=f"Up to {MAX_FILES} pictures")
    files.preprocess = _as_uploaded
    button = gr.Button("Caption all", variant="primary")
    with gr.Accordion("Settings", open=False):
        settings = _add_settings(gr, captioner)
    table = gr.Dataframe(
        headers=COLUMNS, datatype="str", interactive=False, wrap=True, column_widths=["18%", "37%", "15%", "30%"], label="Captions"
    )
    run = partial(_caption_files, gr, captioner)
    button.click(run, [files, *settings], table, api_name="caption_files", concurrency_id="model")


def _caption_files(
    gr: Any, captioner: Captioner, files: Any, beams: float, temperature: float, length: float, prompt: str | None
) -> Iterator[list[list[str]]]:
    """The table, row by row: file, caption, confidence, and the reason if there is no caption."""
    if files is None or not files.root:
        raise _error(gr, "Choose pictures first.")
    uploads = files.root
    if len(uploads) > MAX_FILES:
        raise _error(gr, f"{len(uploads)} pictures are too many: choose at most {MAX_FILES}.")
    paths = [Path(upload.path) for upload in uploads]
    rows: list[list[str]] = []
    try:
        results = captioner.stream(
            paths, on_error="yield", attention=False, batch_size=4, **_settings(beams, temperature, length, prompt)
        )
    except ValueError as error:
        raise _error(gr, error) from error
    for upload, result in zip(uploads, results):
        if isinstance(result, ImageError):
            rows.append([_name(upload), "", "", _message(result, upload)])
        else:
            confidence = "" if result.confidence is None else f"{result.confidence:.2f}"
            rows.append([_name(upload), result.text, confidence, ""])
        yield rows
