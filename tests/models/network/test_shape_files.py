"""The shapes that come with the package have the parameters that their makers publish."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from posttrain_dist.errors import ModelError
from posttrain_dist.models.architectures.shape_files import shape_folder, shape_names
from posttrain_dist.models.folder import check_folder, load_tokenizer, read_network, resolve
from posttrain_dist.models.network.build_network import build_network

# Of the safetensors that are published; tied weights once. Llama 65B's of its conversion.
PUBLISHED = {
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-1b": 999_885_952,
    "llama1-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mistral-small-24b": 23_572_403_200,
    "phi-4": 14_659_507_200,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}
# Of these the published number has the image tower, and the projection of its 1152 values with a
# norm over them: SigLIP of 896 pixels has 416,866,032 parameters.
WITH_IMAGES = {
    "gemma3-4b": (4_300_079_472, 2560),
    "gemma3-12b": (12_187_325_040, 3840),
    "gemma3-27b": (27_432_406_640, 5376),
}
SIGLIP, WIDTH = 416_866_032, 1152


def test_every_shape_has_the_published_number_of_parameters():
    text = {n: whole - SIGLIP - WIDTH * (d + 1) for n, (whole, d) in WITH_IMAGES.items()}
    found = {name: read_network(f"shape:{name}").num_parameters for name in shape_names()}
    assert found == {**PUBLISHED, **text}


def test_transformers_reads_every_shape_as_the_same_model():
    import transformers

    for name in shape_names():
        config = json.loads((shape_folder(f"shape:{name}") / "config.json").read_text())
        read = transformers.AutoConfig.for_model(**config)
        own, whole = build_network(config), build_network(read.to_dict())
        assert own.shape == whole.shape, name
        assert list(own.tensors()) == list(whole.tensors()), name
        assert read.architectures == config["architectures"], name


def test_windows_of_the_layers():
    gemma3 = read_network("shape:gemma3-27b").shape
    assert gemma3.window_L[:7] == (1024, 1024, 1024, 1024, 1024, None, 1024)
    assert read_network("shape:gemma2-2b").shape.window_L[:3] == (4096, None, 4096)
    assert set(read_network("shape:mistral-7b").shape.window_L) == {4096}
    assert set(read_network("shape:qwen2.5-72b").shape.window_L) == {None}


def test_a_window_that_the_architecture_does_not_read_is_none():
    config = json.loads((shape_folder("shape:llama3-8b") / "config.json").read_text())
    assert set(build_network({**config, "sliding_window": 64}).shape.window_L) == {None}


def test_an_unknown_name_has_the_nearest_and_all_there_are():
    with pytest.raises(ModelError) as caught:
        resolve("shape:Llama3-70")
    assert "no shape has the name 'Llama3-70'" in caught.value.what
    assert "did you mean shape:llama3-70b?" in caught.value.fix
    assert all(name in caught.value.fix for name in shape_names())
    for name in ("shape:", "shape:..", "shape:../tiny_base", "shape:/etc"):
        with pytest.raises(ModelError, match="no shape has the name"):
            resolve(name)


def test_a_shape_is_not_trained():
    folder = resolve("shape:qwen3-0.6b")
    with pytest.raises(ModelError, match="sizes of a model alone: it has no weights") as caught:
        check_folder(folder)
    assert "posttrain plan" in caught.value.fix
    assert check_folder(folder, need_weights=False)["hidden_size"] == 1024
    with pytest.raises(ModelError, match="it has no tokenizer"):
        load_tokenizer(folder)


def test_a_network_is_read_without_torch_and_a_layer_once():
    script = (
        "import sys\nfrom posttrain_dist.models.folder import read_network\n"
        "print(read_network('shape:llama3-70b').num_parameters)\n"
        "print([n for n in ('torch', 'transformers', 'peft', 'numpy') if n in sys.modules])\n"
    )
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["70553706496", "[]"]
    config = json.loads((shape_folder("shape:llama3-70b") / "config.json").read_text())
    # At once: equal layers are one object, which is made once.
    assert len({id(layer) for layer in build_network(config).layers}) == 1
