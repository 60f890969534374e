"""What an ONNX folder says of its decoder, and the memory that running it takes. Without onnxruntime."""

from __future__ import annotations

from gramlite.errors import ModelError
from gramlite.formats.artifact import Artifact
from gramlite.formats.model_folder import ModelFolder, read_json_object
from gramlite.formats.onnx_graph import OnnxGraph

from . import folder_memory
from .memory import Footprint

GENAI = "genai_config.json"


def graph_name(artifact: Artifact) -> str:
    """The decoder's file as genai_config.json names it, model.onnx without one; raises ModelError for no plain name."""
    path = artifact.path / GENAI
    model = read_json_object(path).get("model") or {} if path.is_file() else {}
    decoder = model.get("decoder") if isinstance(model, dict) and path.is_file() else {}
    name = decoder.get("filename", "model.onnx") if isinstance(decoder, dict) else None
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ModelError(f"{path} names no decoder of this folder ({name!r}). Export it again.")
    if not (artifact.path / name).is_file():
        raise ModelError(f"{artifact.path / name} is missing. Export or download it again.")
    return name


def head_size(folder: ModelFolder, graph: OnnxGraph) -> int:
    """The graph's own, else that of config.json: the model builder leaves it open."""
    return graph.head_size or folder_memory.head_size(folder)


def footprint(folder: ModelFolder, graph: OnnxGraph) -> Footprint:
    """What the session takes: onnxruntime packs the weights anew while it loads, so they count twice."""
    item = 2 if graph.half else 4
    return Footprint(
        weights=2 * graph.weights,
        token=len(graph.past) * graph.key_value_heads * head_size(folder, graph) * item,
        compute=folder_memory.compute_bytes(folder, graph.vocabulary),
    )
