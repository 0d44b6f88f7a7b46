"""Runs of the language stages, read again."""

import torch

from language_run import write_language_run
from reaf_hsenet.mllm_config import trained_state
from reaf_hsenet.mllm_run import load_mllm


def test_a_run_is_rebuilt_from_its_folder(prepared, tmp_path):
    folder = write_language_run(tmp_path / "run", prepared)
    run, again = load_mllm(folder), load_mllm(folder)
    assert (run.stage, run.config.vision, run.guided, run.data) == ("mrg", "stage1", False, prepared)
    assert not run.model.training and run.model.visual_tokens == 8
    for name, tensor in trained_state(run.model).items():
        assert torch.equal(tensor, trained_state(again.model)[name])
    assert run.tokenizer.decode(run.tokenizer.encode("No pleural effusion.", special_tokens=False)) == "No pleural effusion."
