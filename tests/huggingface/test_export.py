"""Exported folders in transformers: logits, tokens, texts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from exports import BOUND, STRUCTURES, drawn, error, exported_config, llama_tokenizer
from megastruct.errors import UserError
from megastruct.huggingface.export import check_form, export

SWIGLU, RMS, NO_BIAS = {"activation": "swiglu"}, {"norm": "rmsnorm"}, {"bias": False}
WIDE, GROUPED = {"head_dim": 6}, {"num_key_value_heads": 2}
ODD_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}  # 6 does not divide 16
QK_NORM, EPS = {"qk_norm": True}, {"rope_base": 500.0, "norm_eps": 0.1}
UNTIED, SCALED = {"tie_embeddings": False}, {"base_width": 4, "init_std": 0.2}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("Starcoder2ForCausalLM", {}),
    "gelu-nobias-untied": ("Starcoder2ForCausalLM", NO_BIAS | UNTIED),
    "gelu-grouped-wide": ("Starcoder2ForCausalLM", GROUPED | WIDE),
    "gelu-odd-heads": ("Starcoder2ForCausalLM", ODD_HEADS),
    "gelu-scaled": ("Starcoder2ForCausalLM", SCALED),
    "rms-swiglu": ("LlamaForCausalLM", RMS | SWIGLU),
    "rms-swiglu-nobias-untied": ("LlamaForCausalLM", RMS | SWIGLU | NO_BIAS | UNTIED),
    "rms-swiglu-grouped-wide": ("LlamaForCausalLM", RMS | SWIGLU | GROUPED | WIDE),
    "rms-swiglu-scaled": ("LlamaForCausalLM", RMS | SWIGLU | SCALED),
    "rms-swiglu-odd-heads": ("GraniteForCausalLM", RMS | SWIGLU | ODD_HEADS),
    "rms-swiglu-odd-heads-nobias": ("GraniteForCausalLM", RMS | SWIGLU | ODD_HEADS | NO_BIAS | UNTIED),
    "rms-gelu": ("ArceeForCausalLM", RMS),
    "rms-gelu-nobias-grouped": ("ArceeForCausalLM", RMS | NO_BIAS | GROUPED | UNTIED),
    "rms-gelu-odd-heads": ("ArceeForCausalLM", RMS | ODD_HEADS),
    "rms-gelu-scaled": ("ArceeForCausalLM", RMS | SCALED),
    "swiglu": ("StableLmForCausalLM", SWIGLU | NO_BIAS),
    "swiglu-grouped-untied": ("StableLmForCausalLM", SWIGLU | NO_BIAS | GROUPED | UNTIED),
    "swiglu-scaled": ("StableLmForCausalLM", SWIGLU | NO_BIAS | SCALED),
    "swiglu-wide": ("LlamaForCausalLM", SWIGLU | NO_BIAS | WIDE),
    "swiglu-wide-untied-scaled": ("LlamaForCausalLM", SWIGLU | NO_BIAS | WIDE | UNTIED | SCALED),
    "swiglu-odd-heads": ("GraniteForCausalLM", SWIGLU | NO_BIAS | ODD_HEADS),
    "qk-norm-grouped-wide": ("Qwen3ForCausalLM", QK_NORM | RMS | SWIGLU | NO_BIAS | GROUPED | WIDE),
    "qk-norm-odd-heads-untied-eps": ("Qwen3ForCausalLM", QK_NORM | RMS | SWIGLU | NO_BIAS | ODD_HEADS | UNTIED | EPS),
    "qk-norm-scaled": ("Qwen3ForCausalLM", QK_NORM | RMS | SWIGLU | NO_BIAS | SCALED),
    "qk-norm-layernorm": ("Qwen3ForCausalLM", QK_NORM | SWIGLU | NO_BIAS | SCALED),
    "other-base-and-eps": ("LlamaForCausalLM", RMS | SWIGLU | EPS),
}


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: Any) -> Path:
    return llama_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 330, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stock_class_computes_the_same_logits(variant: str, transformers: Any, tokenizer: Path, ids: Any, tmp_path):
    architecture, model = VARIANTS[variant]
    trained = drawn(tmp_path, tokenizer, exported_config("lowrank", model))
    assert export(trained, tmp_path / "out").architecture == architecture
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs).__name__ == architecture
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.max_position_embeddings == 64 and theirs.dtype == torch.float32
    with torch.no_grad():
        assert error(theirs(ids).logits, trained.model(ids).transpose(0, 1)) < BOUND


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (QK_NORM | NO_BIAS | RMS, "model.qk_norm = true and model.activation = gelu together"),
        (QK_NORM | SWIGLU | RMS, "model.qk_norm = true and model.bias = true together"),
    ],
)
def test_norms_of_heads_that_no_class_has_are_refused(model: dict[str, Any], found: str) -> None:
    config = exported_config("dense", model)
    with pytest.raises(UserError, match=found) as caught:
        check_form(config, "merged")
    assert [problem.suggestion for problem in caught.value.problems] == ["--form structured"]
    check_form(config, "structured")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_all_structures_are_multiplied_out(structure: str, transformers: Any, tokenizer: Path, ids: Any, tmp_path):
    trained = drawn(tmp_path, tokenizer, exported_config(structure, RMS | SWIGLU))
    export(trained, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert error(theirs(ids).logits, trained.model(ids).transpose(0, 1)) < BOUND


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    "model",
    [{}, SWIGLU | GROUPED | WIDE | UNTIED | SCALED, RMS | SWIGLU | NO_BIAS, QK_NORM | GROUPED | WIDE | EPS],
    ids=["gelu", "swiglu", "rms", "qk-norm"],
)
def test_the_structured_form_keeps_the_factors(structure: str, model: Any, transformers: Any, tokenizer, ids, tmp_path):
    trained = drawn(tmp_path, tokenizer, exported_config(structure, model, ffn={"dense_first_block": True}))
    export(trained, tmp_path / "out", "structured")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    stored = {name: parameter.shape for name, parameter in theirs.named_parameters()}
    assert stored == {name: parameter.shape for name, parameter in trained.model.named_parameters()}
    with torch.no_grad():
        ours = trained.model(ids).transpose(0, 1)
        assert error(theirs(ids).logits, ours) < BOUND
        step = theirs(ids[:, :25], use_cache=True)
        rest = theirs(ids[:, 25:], **{name: step[name] for name in ("cache", "past_key_values") if name in step})
        assert error(torch.cat((step.logits, rest.logits), 1), ours) < BOUND
        assert theirs(ids, logits_to_keep=1).logits.shape == (2, 1, 330)


def test_the_modelling_file_does_what_transformers_asks(transformers: Any, tokenizer: Path, ids: Any, tmp_path):
    trained = drawn(tmp_path, tokenizer, exported_config("lowrank"))
    export(trained, tmp_path / "out", "structured")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == trained.config.model.num_layers + 1
    assert torch.equal(output.hidden_states[0], model.embedding(ids))
    weight = model.embedding.weight if model.head is None else model.head.weight
    assert error(output.hidden_states[-1] @ weight.detach().T, output.logits) < BOUND
    loss, logits = model(ids, labels=ids, return_dict=False)[:2]
    assert torch.equal(logits, output.logits) and loss.dim() == 0
    with pytest.raises(ValueError, match="attention weights"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="cache that grows"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")

    def gradients() -> list[Any]:
        model.zero_grad()
        model.train()(ids, labels=ids, use_cache=True).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain, calls = gradients(), []
    model.gradient_checkpointing_enable()
    model.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for ours, theirs in zip(gradients(), plain, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert len(calls) == 2  # in the forward, and again in the backward


@pytest.mark.parametrize("form", ["merged", "structured"])
def test_generate_continues_as_our_greedy_loop_does(form: Any, transformers: Any, tokenizer: Path, tmp_path):
    """Prompts of unequal length in one batch, padded on the left; words without a piece are never taken."""
    trained = drawn(tmp_path, tokenizer, exported_config("blockdense", {"vocab_size": 352} | GROUPED))
    export(trained, tmp_path / "out", form)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompts = ["The river", "  two  spaces\nand a new line"]
    batch = theirs(prompts, return_tensors="pt", padding=True)
    made = model.generate(**batch, max_new_tokens=12, do_sample=False)
    for prompt, row in zip(prompts, made, strict=True):
        wanted = greedy(trained, prompt, 12)
        assert row[batch["input_ids"].shape[1] :][: len(wanted)].tolist() == wanted
        assert len(wanted) == 12 or row[-1] == trained.tokenizer.eod_id


def greedy(trained: Any, prompt: str, count: int) -> list[int]:
    ids, new = trained.tokenizer.encode([prompt])[0].tolist(), []
    while len(new) < count and trained.tokenizer.eod_id not in new:
        with torch.no_grad():
            logits = trained.model(torch.tensor([ids + new]))[-1, 0, : trained.tokenizer.vocab_size]
        new.append(int(logits.argmax()))
    return new


@pytest.mark.parametrize("form", ["merged", "structured"])
def test_packed_documents_are_separate_with_restarting_positions(form, transformers, tokenizer, ids, tmp_path):
    config = exported_config(training={"document_attention": "separate"})
    trained = drawn(tmp_path, tokenizer, config)
    trained.model.eod_id = eod = trained.tokenizer.eod_id
    export(trained, tmp_path / "out", form)
    ids[:, [9, 10, 27]] = eod
    starts = torch.zeros_like(ids)
    starts[:, 1:] = torch.where(ids[:, :-1] == eod, torch.arange(1, ids.shape[1]), 0)
    positions = torch.arange(ids.shape[1]) - starts.cummax(1).values
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        ours = trained.model(ids).transpose(0, 1)
        assert error(model(ids, position_ids=positions, use_cache=False).logits, ours) < BOUND
        assert error(model(ids, use_cache=False).logits, ours) > 0.1
    assert "position_ids" in (tmp_path / "out/README.md").read_text()


TEXTS = [
    "The garden of winter, 1234.5 -- isn't it?",
    "def f(x):\n    if x:\n\t\treturn x ** 2  # two\n\n",
    "    four spaces, three   spaces  ",
    " one",
    "",
    " ",
    "\n\r\n",
    "</s> <s> a</s>b <unk> <0x41>",
    "naïve e\u0301 \u00a0\u200b\ufeff ﬁ",
    "日本語 Привет مرحبا 🙂👩‍👩‍👧",
    "a\u2581b \u2581 c\x00d",
    "aaaaaaaaaaaaaaaaaaa",
]


def test_the_tokenizer_gives_the_same_ids_and_texts(transformers: Any, tokenizer: Path, tmp_path):
    trained = drawn(tmp_path, tokenizer, exported_config())
    export(trained, tmp_path / "out")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), trained.tokenizer
    for text, ids in zip(TEXTS, ours.encode(TEXTS), strict=True):
        assert theirs(text)["input_ids"] == ids.tolist(), text
        assert theirs.decode(ids.tolist()) == ours.decode(ids), text
    assert theirs.bos_token == theirs.eos_token == theirs.pad_token == "</s>" and theirs.padding_side == "left"
    assert theirs.eos_token_id == ours.eod_id and theirs.model_max_length == 64
    out = tmp_path / "out"
    for name in ("config.json", "generation_config.json"):
        values = json.loads((out / name).read_text())
        assert values["bos_token_id"] == values["eos_token_id"] == ours.eod_id
    values = json.loads((out / "config.json").read_text())
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 10_000.0
    assert values["sliding_window"] is None


def test_bfloat16_weights_are_the_rounded_masters(transformers: Any, tokenizer: Path, tmp_path):
    trained = drawn(tmp_path, tokenizer, exported_config("dense"))
    export(trained, tmp_path / "out", dtype="bfloat16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    weight = trained.model.get_submodule("blocks.1.mlp.fc2").weight
    assert torch.equal(theirs.model.layers[1].mlp.c_proj.weight, weight.bfloat16())


def test_large_models_are_written_in_several_files(transformers: Any, tokenizer: Path, ids, tmp_path, monkeypatch):
    monkeypatch.setattr("megastruct.huggingface.folder.MAX_SHARD_SIZE", "10KB")
    trained = drawn(tmp_path, tokenizer, exported_config())
    export(trained, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert error(theirs(ids).logits, trained.model(ids).transpose(0, 1)) < BOUND


@pytest.mark.parametrize("tied", [True, False])
def test_the_modelling_file_trains_as_a_class_of_transformers_does(tied, transformers, tokenizer, ids, tmp_path):
    """Loss (also over accumulated batches), chosen positions, and a larger vocabulary, beside the merged class."""
    trained = drawn(tmp_path, tokenizer, exported_config("lowrank", {"tie_embeddings": tied}))
    models = []
    for form in ("merged", "structured"):
        export(trained, tmp_path / form, form)
        load = transformers.AutoModelForCausalLM.from_pretrained
        models.append(load(tmp_path / form, trust_remote_code=form == "structured", dtype=torch.float32).eval())
    labels = ids.clone()
    labels[0, :7] = -100
    for keys in ({}, {"num_items_in_batch": torch.tensor(500)}):
        merged, structured = (float(model(ids, labels=labels, **keys).loss.detach()) for model in models)
        assert structured == pytest.approx(merged, rel=1e-5)
    with torch.no_grad():
        merged, structured = (model(ids, logits_to_keep=torch.tensor([3, 5])).logits for model in models)
    assert error(structured, merged) < BOUND
    for model in models:
        model.resize_token_embeddings(340)
        assert model(ids).logits.shape[-1] == 340
