"""A page and an HTTP API for one trained model, whose answers are those of predict.py.

$ python demo.py --fast
$ python demo.py --ckpt out/stage2
$ python demo.py --ckpt out/llm_fast --root clips --no-page

The page is gradio's (pip install -r requirements-extra.txt); without it the API needs nothing but the requirements.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import predict
from common import config, dist
from common.config import UserError, opt
from data.features import decode_clip
from data.manifest import Clip
from data.media import SAMPLE_RATE, Absent, load_audio, load_frames
from data.merr import load_merr
from data.mock import make_mock
from data.prompts import LAYOUTS
from evals.emotion import DecodeConfig
from evals.page import Html, as_jpeg, tag
from model.combine import WAYS
from model.published import PublishedConfig
from tools import serve
from tools.batching import Line

FAST = "out/llm_fast"  # what train_llm.py --fast leaves
EXTRA = "pip install -r requirements-extra.txt"
EXAMPLES = 6
SHOWN = 4  # frames of a stream


@dataclass
class Config:
    ckpt: list[str] = opt(
        [], "a run folder (its best, else its last checkpoint), one checkpoint or a published .pth", "--ckpt"
    )
    combine: str | None = opt(
        None, "several --ckpt as one: the mean of their weights, or of their predictions", "--combine", choices=WAYS
    )
    fast: bool = opt(
        False, "serve the model of train_llm.py --fast, trained first if it is not in out/llm_fast", "--fast"
    )
    llm: str | None = opt(None, "other place of the frozen language model than in training", "--llm")
    device: str = opt("auto", "cpu, cuda or cuda:N", "--device")
    prompt_layout: str | None = opt(None, "another prompt layout than in training", choices=LAYOUTS)
    host: str = opt("127.0.0.1", "address to listen on; 0.0.0.0 for all of the machine's", "--host")
    port: int = opt(7889, "port to listen on; 0: any that is free", "--port")
    root: str | None = opt(None, "folder whose clips may be named by their path; none: uploads alone", "--root")
    token: str | None = opt(None, "what everyone must know who asks", "--token")
    max_upload_mb: float = opt(64.0, "largest clip, in MB", "--max-upload-mb")
    max_seconds: float = opt(120.0, "longest clip, in seconds", "--max-seconds")
    queue: int = opt(32, "requests that are taken in at a time; more get status 503", "--queue")
    batch_size: int = opt(8, "waiting requests with the same question that are answered together", "--batch-size")
    page: bool = opt(True, "serve the page beside the API", "--page")
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    model: PublishedConfig = field(default_factory=PublishedConfig)  # read for a published .pth only


def main(cfg: Config) -> None:
    check(cfg)
    server = serve.Server(cfg.host, cfg.port)
    if cfg.fast:
        make_fast(cfg)
    predictor = predict.load(cfg.ckpt, cfg.device, cfg.decode, cfg.llm, cfg.combine, cfg.model)
    predict.prepare(predictor, cfg.prompt_layout)  # whatever is missing is said before the port opens
    if not senses(predictor):
        made = ", ".join(predictor.made)
        raise UserError(f"{predictor.folder}: other tools made its features ({made}), so no clip can be answered")
    # what is drawn depends on the other rows of a batch
    size = 1 if cfg.decode.temperature > 0 else cfg.batch_size
    with TemporaryDirectory(prefix="emotorch-") as folder:
        service = serve.Service(
            Line(predictor, cfg.queue, size), Path(folder), Path(cfg.root) if cfg.root else None, cfg.token,
            round(cfg.max_upload_mb * 2**20), cfg.max_seconds,
        )  # fmt: skip
        page = PageServer(service, Path(folder)) if cfg.page else None
        server.page = page and page.socket
        server.start(service)
        host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
        print(f"{'page and API' if page else 'API'}: http://{host}:{server.server_port}/  (Ctrl-C ends it)", flush=True)
        stop = dist.Stop()
        while not stop.requested:
            time.sleep(0.1)
        print("stopping: requests in flight get status 503", flush=True)
        service.line.close()
        if page:
            page.stop()  # its open connections would keep the server
        server.stop()
    print("stopped")


def check(cfg: Config) -> None:
    """UserError for what no type rules out."""
    if bool(cfg.ckpt) == cfg.fast:
        raise UserError("--ckpt and --fast: one of them is needed" + (", not both" if cfg.fast else " (see --help)"))
    for flag, value in (("--max-upload-mb", cfg.max_upload_mb), ("--max-seconds", cfg.max_seconds),
                        ("--queue", cfg.queue), ("--batch-size", cfg.batch_size)):  # fmt: skip
        if value <= 0:
            raise UserError(f"{flag}: {value:g} is not positive")
    if cfg.root is not None and not Path(cfg.root).is_dir():
        raise UserError(f"--root {cfg.root}: not a folder")
    if cfg.token is not None and not cfg.token.strip():
        raise UserError("--token: is empty")
    if cfg.page and find_spec("gradio") is None:
        raise UserError(f"the page needs gradio: {EXTRA}; --no-page serves the API without it")


def make_fast(cfg: Config) -> None:
    """Sets what --fast serves, after training it where it is not there yet."""
    if not any(Path(FAST, "checkpoints").glob("best")):
        print(f"--fast: training a small model on synthetic clips first, in {FAST}", flush=True)
        script = Path(__file__).with_name("train_llm.py")
        if code := subprocess.run([sys.executable, str(script), "--fast", "--no-test", "--out", FAST]).returncode:
            raise UserError(f"train_llm.py --fast: ended with exit code {code}")
    cfg.ckpt = [FAST]
    cfg.root = cfg.root or str(Path(FAST, "mock", "video"))


# ---- the page


class PageServer:
    """gradio's page behind a socket in a folder, where tools/serve.py alone finds it."""

    def __init__(self, service: serve.Service, folder: Path) -> None:
        os.environ["GRADIO_TEMP_DIR"] = str(folder / "page")  # uploads; the folder goes when the server ends
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is told to anyone
        import gradio
        import uvicorn
        from fastapi import FastAPI

        self.socket, examples = folder / "page.sock", make_examples(folder / "examples")
        look(service, examples[0].path, None)  # the first visitor shall not wait for decoders to be imported
        app = gradio.mount_gradio_app(
            FastAPI(openapi_url=None), make_page(service, examples), path="/",
            allowed_paths=[str(folder / "examples")], max_file_size=service.max_bytes, ssr_mode=False,
            footer_links=[], show_error=False,
        )  # fmt: skip
        settings = uvicorn.Config(app, uds=str(self.socket), log_level="critical", timeout_graceful_shutdown=1)
        self.uvicorn = uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.uvicorn.run, name="page", daemon=True)
        self.thread.start()
        while not self.uvicorn.started and self.thread.is_alive():
            time.sleep(0.05)
        if not self.uvicorn.started:
            raise UserError(f"the page cannot listen at {self.socket} (is the path too long? TMPDIR sets another)")

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(5)


def make_examples(folder: Path) -> list[Clip]:
    """Clips as data/mock.py draws and speaks them, in a format that browsers show."""
    make_mock(folder, train=0, test=EXAMPLES, seed=1, size=192, codec="h264")
    return load_merr(folder, "relative_test3_NCEV.txt")[0]


def senses(predictor: predict.Predictor) -> set[str]:
    """What the model goes by: video, audio, text."""
    if isinstance(predictor, predict.TurnPredictor):
        return {"text", *predictor.streams.encoders}
    encoders = [predictor.encoder(name) for name in predictor.made]
    words = {"text"} if isinstance(predictor, predict.LlmPredictor) else set()
    return words | {encoder.modality for encoder in encoders if encoder is not None}


def shortcuts(predictor: predict.Predictor) -> dict[str, str]:
    """Buttons and the questions that they ask: a task alone asks as in training, where the model was trained on it."""
    if not isinstance(predictor, predict.LlmPredictor):
        return {"Ask": ""}
    why = [task for task in predictor.data.task_pool if task.startswith("reason")]
    return {"Emotion": "[emotion]"} | ({"Reason": f"[{why[0]}]"} if why else {})


def make_page(service: serve.Service, examples: Sequence[Clip]) -> Any:
    """The page: a clip and words on one side, the conversation on the other, what was seen and heard below."""
    import gradio as gr

    predictor = service.line.predictor
    goes_by, asks = senses(predictor), isinstance(predictor, predict.LlmPredictor)
    sees, hears, reads = (sense in goes_by for sense in ("video", "audio", "text"))
    tasks = shortcuts(predictor)
    with gr.Blocks(title="emotorch", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# emotorch\nWhat a person in a clip seems to feel, as a model sees, hears and reads it.")
        turns = gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                with gr.Tabs(visible=sees or hears):
                    with gr.Tab("Video", visible=sees):
                        video = gr.Video(label="clip", sources=["upload", "webcam"], height=240, elem_id="clip")
                    with gr.Tab("Sound", visible=hears):
                        sound = gr.Audio(
                            label="sound alone", sources=["upload", "microphone"], type="filepath", elem_id="sound"
                        )
                said = gr.Textbox(label="what the person says", max_length=serve.WORDS, visible=reads, elem_id="words")
                look_at = gr.HTML(visible=sees or hears, elem_id="clip-seen")
            with gr.Column(scale=3, min_width=300):
                chat = gr.Chatbot(label="conversation", height=280, render_markdown=False, buttons=[], elem_id="chat")
                question = gr.Textbox(
                    label="question", placeholder="What do you want to know about this clip?",
                    max_length=serve.WORDS, visible=asks, elem_id="question",
                )  # fmt: skip
                with gr.Row():
                    buttons = [gr.Button(name, variant="primary", min_width=80, elem_id=name.lower()) for name in tasks]
                    send = gr.Button("Send", min_width=80, visible=asks, elem_id="send")
                    restart = gr.Button("Restart", min_width=80, elem_id="restart")
                bars = gr.Label(label="probabilities", show_heading=False, elem_id="bars")
                found = gr.HTML(elem_id="found")
        if sees:
            rows = [[clip.path, clip.text or ""] for clip in examples]
            gr.Examples(rows, [video, said], label="examples: drawn faces, synthetic voices", api_name=False)

        own: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None}  # the one queue is the model's
        given, shown = [video, sound, said, chat, turns], [chat, turns, bars, found]
        for button, asked in zip(buttons, tasks.values(), strict=True):
            button.click(partial(converse, service, asked), given, shown, **own)
        for ask in (send.click, question.submit):
            ask(partial(converse, service), [question, *given], shown, **own).then(lambda: "", None, question, **own)
        for begin in (restart.click, chat.clear):
            begin(lambda: ([], [], None, ""), None, shown, **own)
        for clip in (video, sound):  # another clip is another conversation
            clip.change(partial(look, service), [video, sound], look_at, **own)
            clip.change(lambda: ([], [], None, ""), None, shown, **own)
    return page


def converse(
    service: serve.Service, question: str, video: str | None, sound: str | None, said: str | None, chat: list,
    turns: list,
) -> Iterator[tuple]:  # fmt: skip
    """Messages, turns, probabilities and what was found, while a question about a clip is answered."""
    from gradio import skip

    predictor, path = service.line.predictor, video or sound
    asks, dialogue = (isinstance(predictor, kind) for kind in (predict.LlmPredictor, predict.LanguagePredictor))
    asked = question if asks else said if dialogue else "What is felt here?"
    messages, shown = [*chat, {"role": "user", "content": asked or "…"}], {str(path): "the clip"}

    def now(text: str) -> list:
        return [*messages, {"role": "assistant", "content": text}]

    yield now("…"), skip(), skip(), ""
    try:
        if path is None and not (said or "").strip():
            raise serve.Problem(400, "bad_request", "choose or record a clip first, or write what the person says")
        with service.line.place():
            job = serve.ask(
                service, Path(path) if path else None, question if asks else None, said or None,
                [tuple(turn) for turn in turns],
            )  # fmt: skip
            shown[job.clip.id] = "the clip"
            try:
                for text in job.texts():
                    yield now(text), skip(), skip(), ""
            finally:  # the one who asked may have gone
                job.cancel()
            result = serve.told(job.result(), shown)
    except Exception as error:
        problem = serve.problem(error, shown)
        yield now(f"{problem.error} (status {problem.status})"), skip(), skip(), ""
        return
    score = f" (score {result['score']:.2f})" if "score" in result else ""
    turns = [*turns, (asked, result["text"])] if dialogue else turns
    yield now(result["text"] + score), turns, result.get("probabilities") or skip(), listed(result)


def listed(result: dict[str, Any]) -> str:
    """Which modalities were found, and why others were not, as HTML."""
    gone = [tag("li", "without ", tag("b", name), f": {why}") for name, why in result["missing"].items()]
    return tag("div", "found: ", tag("b", ", ".join(result["available_modalities"])), tag("ul", *gone))


def look(service: serve.Service, video: str | None, sound: str | None) -> str:
    """The frames and the waveform that a clip gives the model, or what is wrong with it, as HTML."""
    path, parts = video or sound, []
    try:
        if path is not None:
            service.check(Path(path))
            parts += [strip(stream, frames) for stream, frames in seen(service.line.predictor, path)]
            with suppress(Absent):
                parts.append(waveform(load_audio(path)))
    except Exception as error:
        parts.append(tag("p", serve.problem(error, {str(path): "the clip"}).error))
    return tag("div", *parts)


def seen(predictor: predict.Predictor, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The frames (n, H, W, 3) that each stream of a model is made of, as far as the clip has any."""
    with suppress(Absent):
        if isinstance(predictor, predict.TurnPredictor):
            yield "video", load_frames(path, predictor.mllm.cfg.towers.num_frames)
            return
        for name, made in predictor.made.items():
            encoder = predictor.encoder(name)
            if encoder is not None and encoder.modality == "video":
                yield name, decode_clip(Clip(name, path), encoder, made["pooling"], made.get("frame", "middle"))


def strip(stream: str, frames: torch.Tensor) -> Html:
    """Some of the frames (n, H, W, 3) side by side."""
    chosen = sorted({round(i) for i in np.linspace(0, len(frames) - 1, SHOWN)})
    images = [
        tag("img", src=as_jpeg(frames[i])[0], alt=f"{stream}: frame {i + 1}", style=f"width:{100 / SHOWN - 1:.1f}%")
        for i in chosen
    ]
    count = "frame" if len(frames) == 1 else "frames" if len(chosen) == len(frames) else f"of {len(frames)} frames"
    row = tag("div", *images, style="display:flex;gap:1%")
    return tag("figure", row, tag("figcaption", f"{stream}: {len(chosen)} {count}"), style="margin:0 0 .5rem")


def waveform(samples: torch.Tensor, columns: int = 400) -> Html:
    """A waveform (T,) at 16 kHz as a drawing: of each column the least and the greatest sample."""
    parts = np.array_split(samples.numpy(), min(columns, len(samples)))
    top = max(float(samples.abs().max()), 1e-6)
    bars = [f"M{i} {40 - 38 * part.max() / top:.1f}V{40.5 - 38 * part.min() / top:.1f}" for i, part in enumerate(parts)]
    drawing = tag(
        "svg", tag("path", d="".join(bars), stroke="currentColor"), viewBox=f"0 0 {len(parts)} 80",
        preserveAspectRatio="none", role="img", aria_label="waveform", style="width:100%;height:4rem;display:block",
    )  # fmt: skip
    return tag("figure", drawing, tag("figcaption", f"sound: {len(samples) / SAMPLE_RATE:.2f} s"), style="margin:0")


if __name__ == "__main__":
    config.run(Config, main)
