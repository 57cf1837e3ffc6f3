"""The conformance kit on the tasks that train nothing, and on one that is broken."""

import pytest
from sista_tasks.retrieval import RetrievalTask

from sista_pl.testing import CHECKS, check_task

pytestmark = pytest.mark.slow


class ScoresNaN(RetrievalTask):
    def outputs(self, batch):
        return {name: values.nan_to_num() for name, values in super().outputs(batch).items()}


class Learns(RetrievalTask):
    def outputs(self, batch):
        self.joint.image_head.pooled.inner.weight.mul_(1.01)
        return super().outputs(batch)


@pytest.mark.parametrize("name", ["zeroshot_chexpert.yaml", "retrieval_mimic.yaml", "ground_rsna.yaml"])
def test_our_own_evaluations_pass(name, pretrained):
    check_task(["--config", name, "--model.weights", str(pretrained)], size=48, studies=100)


@pytest.mark.parametrize(
    ("task", "check", "text"),
    [
        (ScoresNaN, "nan", "end with exit code 0, not with one line and 2"),
        (Learns, "frozen", "joint.image_head.pooled.inner.weight has changed in a test"),
    ],
)
def test_a_broken_evaluation_is_told_so_in_one_line(
    task, check, text, pretrained, tmp_path_factory, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path_factory.getbasetemp() / "kit-of-evaluations"
    command = ["--config", "retrieval_mimic.yaml", "--model.weights", str(pretrained), "--model", task.__name__,
               "--model.weights", str(pretrained)]  # fmt: skip
    with pytest.raises(AssertionError) as error:
        check_task(command, size=48, studies=100, folder=folder, skip=set(CHECKS) - {check})
    assert str(error.value).startswith(f"{task.__name__}: {check}: "), error.value
    assert text in str(error.value)
