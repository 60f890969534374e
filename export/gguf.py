"""Hugging Face checkpoint -> GGUF in F32, F16 or BF16, with nothing lost beyond the dtype.

The plan comes first: every tensor is matched by name and shape, the tokenizer is read, the header is laid out. Then the
weights stream from the safetensors files into the GGUF piece by piece, hashed on both sides. Linear layers and
embeddings take the dtype asked for, vectors (norms, biases) stay F32, as llama.cpp needs them.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy

from gramlite.formats.architecture import Architecture, ExpectedTensor, rope_factors
from gramlite.formats.artifact import Manifest
from gramlite.formats.checkpoint import StoredTensor, open_checkpoint
from gramlite.formats.gguf_data import GgufData
from gramlite.formats.publish import add_template, describe_source, publish_file, tool_versions, unicode_name
from gramlite.formats.tensor_stream import SourceHash, convert_checked, permute_heads, read_ahead, read_pieces
from gramlite.formats.tokenizer import Vocabulary
from gramlite.generation.scaffold import ChatTemplate
from gramlite.judging.template import judge_template
from gramlite.options import chat_options
from gramlite.storage import check_output
from gramlite.terminal import note

from .plan import Plan, plan_export
from .report import Advance, judge_command, print_artifact, print_notes, progress_bar
from .smoke import smoke_judge, smoke_option

DTYPES = ("f16", "bf16", "f32")
ALIGNMENT = 32
HEADER_BYTES = 32 << 20


def export_gguf(
    folder: Path, destination: Path, *, dtype: str = "f16", template: str | None = None, force: bool = False
) -> Manifest:
    """Write a checkpoint folder as one GGUF file with its manifest beside it, and return the manifest.

    `dtype` is f16, bf16 or f32; `template` a built-in judge template's name or a file, by default the one of the
    checkpoint's manifest or model card. Raises ModelError, which names it, for a checkpoint that is refused,
    InputError when `destination` exists and `force` is not set, ResourceError when the disk is full.
    """
    folder, destination = Path(folder), Path(destination)
    destination = check_output(destination, [folder], force=force, file=True, inputs=[template])
    plan = plan_export(open_checkpoint(folder), dtype)
    judge = judge_template(folder, template)
    with progress_bar(plan.payload) as advance:

        def build(temporary: Path) -> Manifest:
            write_header(temporary, plan, judge, destination.stem)
            source_hashes, sha256 = write_tensors(temporary, plan, advance)
            checked = check_written(temporary, folder)
            return Manifest(
                format="gguf",
                name=destination.stem,
                quantization=plan.dtype,
                method="export",
                source=describe_source(folder, source_hashes),
                settings={
                    "dtype": dtype,
                    "pre_tokenizer": plan.vocabulary.pre,
                    "strings_tokenized_alike": checked,
                    "notes": list(plan.notes),
                },
                tools=tool_versions("gguf", "numpy"),
                template={key: judge[key] for key in ("name", "sha256")} if judge else None,
                bits_per_weight=round(8 * plan.payload / plan.weights, 4),
                files={destination.name: sha256},
            )

        return publish_file(destination, build, folder, force=force, need_bytes=plan.payload + HEADER_BYTES)


def write_header(path: Path, plan: Plan, template: dict[str, Any] | None, name: str) -> None:
    """Write everything that stands before the tensors: metadata, tokenizer, template, the tensors' places."""
    import gguf

    writer = gguf.GGUFWriter(path, plan.architecture.family)
    try:
        writer.add_type("model")
        writer.add_name(unicode_name(name))
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if plan.dtype == "F32" else f"MOSTLY_{plan.dtype}"])
        add_architecture(writer, plan.architecture)
        add_vocabulary(writer, plan.vocabulary)
        add_template(writer, template)
        factors = rope_factors(plan.architecture)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for _, expected in plan.tensors:
            stored_as = plan.stored_as(expected)
            kind = gguf.GGMLQuantizationType[stored_as]
            writer.add_tensor_info(
                expected.target, expected.shape, numpy.dtype(numpy.float32), plan.bytes_of(expected), raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def add_architecture(writer: Any, architecture: Architecture) -> None:
    """The family's sizes under llama.cpp's keys."""
    import gguf

    writer.add_vocab_size(architecture.vocabulary)
    writer.add_context_length(architecture.context)
    writer.add_embedding_length(architecture.hidden)
    writer.add_block_count(architecture.layers)
    writer.add_feed_forward_length(architecture.feed_forward)
    writer.add_head_count(architecture.heads)
    writer.add_head_count_kv(architecture.kv_heads)
    writer.add_key_length(architecture.head_size)
    writer.add_value_length(architecture.head_size)
    writer.add_rope_dimension_count(architecture.head_size)
    writer.add_layer_norm_rms_eps(architecture.norm_epsilon)
    writer.add_rope_freq_base(architecture.rope.base)
    if architecture.rope.scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(architecture.rope.scaling))
        writer.add_rope_scaling_factor(architecture.rope.settings["factor"])
    if architecture.rope.scaling == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(architecture.rope.settings["original_max_position_embeddings"]))


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """The tokenizer under llama.cpp's keys."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_merges(vocabulary.merges)
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unknown", writer.add_unk_token_id),
        ("padding", writer.add_pad_token_id),
    ):
        if name in vocabulary.special:
            add(vocabulary.special[name])
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    writer.add_string("gramlite.tokenizer.normalizer", vocabulary.normalizer or "")
    if vocabulary.chat_templates:
        writer.add_chat_template([{"name": name, "template": text} for name, text in vocabulary.chat_templates.items()])


def write_tensors(path: Path, plan: Plan, advance: Advance) -> tuple[dict[str, str], str]:
    """Stream every source file into the GGUF; return the source files' sha256 by name and the GGUF's own."""
    expected = {stored.name: target for stored, target in plan.tensors}
    hashes: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as reader, GgufData(path) as output:
        factors = rope_factors(plan.architecture)
        output.pad(ALIGNMENT)
        if factors is not None:
            output.put(factors)
            output.pad(ALIGNMENT)
        for file in plan.checkpoint.files:
            with file.open("rb", buffering=0) as source:
                source_hash = SourceHash(file)
                tensors = [tensor for tensor in plan.checkpoint.tensors.values() if tensor.file == file]
                source_hash.update(source.read(tensors[0].start if tensors else file.stat().st_size))
                for tensor in tensors:
                    heads = expected[tensor.name].heads if tensor.name in expected else 0
                    pieces = source_hash.over(read_pieces(source, tensor, heads=heads))
                    for piece in read_ahead(pieces, reader):
                        if tensor.name in expected:
                            output.put(convert_piece(piece, tensor, expected[tensor.name], plan))
                            advance(expected[tensor.name].target, len(piece))
                    output.pad(ALIGNMENT)
                hashes[file.name] = source_hash.hexdigest()
        return hashes, output.finish()


def convert_piece(piece: bytes, tensor: StoredTensor, expected: ExpectedTensor, plan: Plan) -> Any:
    """One piece as the file holds it: converted, checked to be finite, its heads' rows in llama.cpp's order."""
    values = convert_checked(piece, tensor, plan.stored_as(expected))
    if expected.heads:
        heads = expected.heads * len(piece) // tensor.bytes
        values = permute_heads(values, heads, plan.architecture.head_size)
    return values


def check_written(path: Path, folder: Path) -> int | None:
    """Read the file back as a judge would: its header by the bounded parser, its tokenizer against the source's own."""
    from gramlite.formats.gguf_header import read_header
    from gramlite.formats.tokenization import compare_tokenizers

    read_header(path)
    return compare_tokenizers(path, folder)


@click.command("gguf", short_help="checkpoint -> GGUF in f16, bf16 or f32")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The GGUF file to write.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES, case_sensitive=False),
    default="f16",
    show_default=True,
    help="Type of the weights.",
)
@click.option("--template", metavar="NAME|FILE", help="The judge's template; by default that of the model card.")
@chat_options
@smoke_option
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    checkpoint: Path,
    output: Path,
    dtype: str,
    template: str | None,
    chat: ChatTemplate,
    smoke: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a Hugging Face CHECKPOINT folder (Llama, Mistral, Qwen2, Qwen3) as one GGUF file, lossless beyond the dtype."""
    manifest = export_gguf(checkpoint, output, dtype=dtype, template=template, force=force)
    print_notes(manifest)
    if not manifest.template:
        note("note: no judge template was found; give --template when you judge")
    if smoke:
        manifest = smoke_judge(output, manifest, checkpoint, template=template, chat=chat, force=force)
    print_artifact(output, manifest, command=judge_command(output, manifest), as_json=as_json)
