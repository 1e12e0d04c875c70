"""The contact sheet as one HTML file that plays its clips, without network: frames are JPEG data URIs, joints are drawn by the browser.

Each clip is an <article> that ends in a JSON block: {"frames": [data URI…], "points": [[y, x, y, x…]…]}, one entry per valid
frame, points in source coordinates. "points" is null for a clip without keypoints.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from html import escape
from typing import Any, BinaryIO

import numpy as np

from clips.codecs.jpeg import JpegCodec

from .shown import Pick, Sheet, small_size, strip_numbers

QUALITY = 80  # of the small frames: 5 KB each
MS_PER_FRAME = 1000 / 29.97  # where the home's name does not tell the clip's length


def write_page(sheet: Sheet, file: BinaryIO) -> None:
    """UTF-8; the same clips give the same bytes. Clips are read and written one after another."""
    source, length_ms = sheet.manifest.source, sheet.manifest.home.get("length_ms")
    known = {"height": source.height, "width": source.width, "ms_per_frame": float(length_ms) / source.frames if length_ms else MS_PER_FRAME}
    file.write(f"{_head(sheet)}\n<main>\n".encode())
    for pick in sheet.picks:
        file.write(_article(sheet, pick).encode())
    file.write(f"</main>\n{_json_block('sheet', known)}\n<script>{SCRIPT}</script>\n</body>\n</html>\n".encode())


def _head(sheet: Sheet) -> str:
    counts = Counter(pick.label for pick in sheet.picks)
    legend = " ".join(f"{_chip(sheet, name, f'{name} {counts[name]}')}" for name in sheet.manifest.classes if counts[name])
    controls = CONTROLS if sheet.picks else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(sheet.title)}: {escape(sheet.sentence)}</title>
<style>{STYLE}</style>
</head>
<body style="--aspect: {sheet.manifest.stored.width} / {sheet.manifest.stored.height}">
<header>
<div><h1>{escape(sheet.title)}</h1><p>{escape(sheet.sentence)} {legend}</p></div>
{controls}
</header>"""


def _article(sheet: Sheet, pick: Pick) -> str:
    facts, key = pick.entry.facts, escape(pick.entry.facts.key)
    prediction = ""
    if pick.prediction is not None and pick.probability is not None:
        prediction = f"<span>predicted</span> {_chip(sheet, pick.prediction, f'{pick.prediction} {pick.probability:.3f}')}"
    strip = "".join(f'<canvas data-frame="{number}" title="frame {number}"></canvas>' for number in strip_numbers(facts.frames_valid))
    return f"""<article style="--label: {sheet.colour_of(pick.label)}">
<h2>{_chip(sheet, pick.label, pick.label)} {prediction} <span class="key">{key}</span></h2>
<div class="pictures"><canvas class="player" role="img" aria-label="{key}" title="click: play or pause"></canvas>
<div class="strip">{strip}</div></div>
<div class="controls"><button type="button" class="play" aria-label="play or pause">Play</button>
<input type="range" min="0" max="{facts.frames_valid - 1}" value="0" aria-label="frame"><output>frame 0</output></div>
<p>{escape(sheet.caption_of(pick))}</p>
{_json_block("clip", _clip_data(sheet, pick))}
</article>
"""


def _clip_data(sheet: Sheet, pick: Pick) -> dict[str, Any]:  # Any: JSON
    """The clip's valid frames and their points."""
    numbers = range(pick.entry.facts.frames_valid)
    codec = JpegCodec(QUALITY)
    blobs = [codec.encode(np.ascontiguousarray(frame)) for frame in sheet.frames_of(pick, numbers, small_size(sheet.manifest.stored))]
    points = sheet.points_of(pick)
    has_points = "keypoints.mp" in pick.entry.members
    return {
        "frames": [f"data:image/jpeg;base64,{base64.b64encode(blob).decode()}" for blob in blobs],
        "points": [points[points[:, 0] == number, 1:].reshape(-1).tolist() for number in numbers] if has_points else None,
    }


def _chip(sheet: Sheet, class_name: str, text: str) -> str:
    return f'<span class="chip" style="background: {sheet.colour_of(class_name)}">{escape(text)}</span>'


def _json_block(name: str, value: dict[str, Any]) -> str:  # Any: JSON
    """Data that the browser does not run: numbers and data URIs alone, so that nothing in it can end the block."""
    return f'<script type="application/json" class="{name}">{json.dumps(value, separators=(",", ":"))}</script>'


CONTROLS = """<div class="controls"><button type="button" id="all">Play all</button>
<label><input type="checkbox" id="joints" checked> keypoints</label>
<label>speed <select id="speed"><option value="1">1×</option><option value="0.5">½×</option><option value="0.25">¼×</option></select></label></div>"""

STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: #1a1a1a; font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
body > header { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 8px 24px; align-items: center;
  justify-content: space-between; padding: 10px 20px; background: #fff; border-bottom: 1px solid #d8dce3; }
h1 { margin: 0; font-size: 17px; overflow-wrap: anywhere; }
p { margin: 0; color: #5b6472; overflow-wrap: anywhere; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 16px; padding: 16px 20px; align-items: start; }
article { background: #fff; border: 1px solid #d8dce3; border-left: 5px solid var(--label); border-radius: 8px; padding: 10px 12px; }
h2 { display: flex; flex-wrap: wrap; gap: 4px 8px; align-items: baseline; margin: 0 0 8px; font-size: 13px; font-weight: 400; color: #5b6472; }
.key { color: #1a1a1a; font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.chip { display: inline-block; padding: 0 8px; border-radius: 5px; color: #fff; font-weight: 600; overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 2fr); gap: 4px; }
.strip { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 4px; align-content: start; }
canvas { display: block; width: 100%; aspect-ratio: var(--aspect); background: #e4e7ec; cursor: pointer; }
.strip canvas.here { outline: 2px solid var(--label); }
.controls { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; }
article .controls { margin: 8px 0 4px; flex-wrap: nowrap; }
button { min-width: 64px; padding: 4px 12px; border: 1px solid #b8bfca; border-radius: 6px; background: #fff; color: inherit; font: inherit; cursor: pointer; }
button:hover { background: #eef1f5; }
input[type=range] { flex: 1; min-width: 60px; accent-color: var(--label); }
output { min-width: 64px; color: #5b6472; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
@media (max-width: 560px) {
  body > header, main { padding-left: 10px; padding-right: 10px; }
  h1 { font-size: 15px; }
  .pictures { grid-template-columns: minmax(0, 1fr); }
  button, select { padding: 8px 14px; }
}
"""

SCRIPT = """
"use strict";
const sheet = JSON.parse(document.querySelector("script.sheet").textContent);
const joints = document.getElementById("joints"), all = document.getElementById("all"), speed = document.getElementById("speed");
const cards = Array.from(document.querySelectorAll("article"), makeCard);
let before = null;  // the time of the last step, in ms; null while nothing plays

function makeCard(article) {
  const clip = JSON.parse(article.querySelector("script.clip").textContent);
  const card = {article, points: clip.points, uris: clip.frames, images: null, position: 0, playing: false, visible: false,
    player: article.querySelector(".player"), thumbs: [...article.querySelectorAll(".strip canvas")],
    button: article.querySelector(".play"), slider: article.querySelector("input"), output: article.querySelector("output")};
  card.button.onclick = card.player.onclick = () => play([card], !card.playing);
  card.slider.oninput = () => { play([card], false); show(card, Number(card.slider.value)); };
  for (const thumb of card.thumbs)
    thumb.onclick = () => { play([card], false); show(card, Number(thumb.dataset.frame)); };
  return card;
}

function load(card) {  // a card's pictures are unpacked when it first comes near the screen
  card.images = card.uris.map((uri, number) => {
    const image = new Image();
    image.onload = () => { if (number === Math.floor(card.position) || card.thumbs.some(t => Number(t.dataset.frame) === number)) paintAll(card); };
    image.src = uri;
    return image;
  });
}

function paint(card, canvas, number) {
  const image = card.images[number];
  const scale = Math.min(devicePixelRatio || 1, 2);
  const width = Math.round(canvas.clientWidth * scale), height = Math.round(canvas.clientHeight * scale);
  if (!image.complete || !image.naturalWidth || !width || !height) return;
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, width, height);
  if (!joints.checked || !card.points) return;
  const places = card.points[number], radius = Math.min(3.5 * scale, Math.max(1.4 * scale, Math.min(width, height) / 76));
  for (const [size, colour] of [[radius * 1.6, "#000"], [radius, "#ffe600"]]) {
    context.fillStyle = colour;
    context.beginPath();
    for (let i = 0; i < places.length; i += 2) {
      const x = (places[i + 1] + 0.5) * width / sheet.width, y = (places[i] + 0.5) * height / sheet.height;
      context.moveTo(x + size, y);
      context.arc(x, y, size, 0, 2 * Math.PI);
    }
    context.fill();
  }
}

function paintAll(card) {
  if (!card.images) return;
  paint(card, card.player, Math.floor(card.position));
  for (const thumb of card.thumbs) paint(card, thumb, Number(thumb.dataset.frame));
}

function show(card, position) {
  card.position = position;
  const number = Math.floor(position);
  card.slider.value = number;
  card.output.textContent = "frame " + number;
  for (const [place, thumb] of card.thumbs.entries()) {
    const next = card.thumbs[place + 1];
    thumb.classList.toggle("here", Number(thumb.dataset.frame) <= number && (!next || number < Number(next.dataset.frame)));
  }
  if (card.images) paint(card, card.player, number);
}

function play(which, playing) {
  for (const card of which) {
    card.playing = playing;
    card.button.textContent = playing ? "Pause" : "Play";
  }
  const some = cards.some(card => card.playing);
  all.textContent = some ? "Pause all" : "Play all";
  if (some && before === null) requestAnimationFrame(step);
}

function step(now) {
  const frames = before === null ? 0 : Math.min(now - before, 250) * Number(speed.value) / sheet.ms_per_frame;
  before = now;
  for (const card of cards)
    if (card.playing && card.visible) show(card, (card.position + frames) % card.uris.length);
  if (cards.some(card => card.playing)) requestAnimationFrame(step);
  else before = null;
}

if (cards.length) {
  const watcher = new IntersectionObserver(entries => {
    for (const entry of entries) {
      const card = cards.find(card => card.article === entry.target);
      card.visible = entry.isIntersecting;
      if (card.visible && !card.images) load(card);
      if (card.visible) paintAll(card);
    }
  }, {rootMargin: "400px"});
  for (const card of cards) { show(card, 0); watcher.observe(card.article); }
  all.onclick = () => play(cards, !cards.some(card => card.playing));
  joints.onchange = () => cards.filter(card => card.visible).forEach(paintAll);
  addEventListener("resize", () => cards.filter(card => card.visible).forEach(paintAll));
}
"""
