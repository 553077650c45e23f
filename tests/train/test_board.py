"""What a run tells TensorBoard beside its curves, read back as TensorBoard's own plugins read it."""

import errno
import os
import resource
from pathlib import Path

import pytest
from launching import rows
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups
from torch.utils.tensorboard import SummaryWriter

from mixmim_ds.train.board import Board


def table(folder: Path) -> list[api_pb2.SessionGroup]:
    """The rows of the HPARAMS dashboard, with `loss` as metric."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    asked = api_pb2.ListSessionGroupsRequest(slice_size=9, allowed_statuses=api_pb2.Status.values())
    asked.col_params.add(metric=api_pb2.MetricName(tag="loss"))
    context = backend_context.Context(TBContext(data_provider=provider))
    return list(list_session_groups.Handler(RequestContext(), context, "", asked).run().session_groups)


def test_a_run_is_one_row_of_the_table_and_its_options_are_there_as_text(twenty: Path) -> None:
    (row,) = table(twenty)
    assert row.hparams["train.global_batch"].number_value == 32
    assert row.hparams["model.encoder"].string_value == "mixmim_tiny"
    assert row.hparams["optim.betas"].string_value == "[0.9, 0.95]"
    (metric,) = row.metric_values
    assert metric.value == pytest.approx(rows(twenty)[-1]["loss"]) and metric.training_step == 20
    assert [session.status for session in row.sessions] == [api_pb2.STATUS_SUCCESS]
    board = EventAccumulator(str(twenty / "tensorboard")).Reload()
    (text,) = board.Tensors("config/text_summary")
    assert "    train:\n" in (said := text.tensor_proto.string_val[0].decode()) and "      global_batch: 32\n" in said


def test_a_disk_that_fails_for_a_moment_costs_only_what_it_did_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk's refusal is imitated."""
    board = Board(tmp_path, 0)

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for step in range(1, 7):
        with monkeypatch.context() as disk:
            if step == 4:
                disk.setattr(SummaryWriter, "add_scalar", refuse)
            board.scalars({"loss": step}, step)
        assert board.writer is None or board.writer.flush() is None
    board.close(finished=True)
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in read.Scalars("loss")] == [1, 2, 3, 5, 6]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the first writer
def test_a_disk_that_stays_full_is_told_once_and_leaves_no_heap_of_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """By a limit of the process's own, which a file of a few bytes reaches."""
    board, limits = Board(tmp_path, 0), resource.getrlimit(resource.RLIMIT_FSIZE)
    board.scalars({"loss": 1}, 1)
    board.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        for step in range(2, 9):
            board.scalars({"loss": step, "lr": step}, step)
            board.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    board.scalars({"loss": 9}, 9)
    board.close(finished=True)
    assert caplog.text.count("cannot be written (File too large)") == 1
    assert capfd.readouterr().err.count("Traceback") <= 1 and len(list(tmp_path.iterdir())) == 2
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")] == [1, 9]


def test_an_option_that_is_no_utf8_is_told_with_its_bytes(tmp_path: Path) -> None:
    board = Board(tmp_path, 0)
    board.options({"data": {"root": os.fsdecode(b"/caf\xe9")}})
    board.close(finished=True)
    (row,) = table(tmp_path)
    assert row.hparams["data.root"].string_value == r"/caf\udce9"


def test_a_run_that_is_stopped_and_goes_on_stays_one_row_that_ends_with_it(tmp_path: Path) -> None:
    for start, loss in ((0, 0.5), (10, 0.25)):
        board = Board(tmp_path / "run", start)
        board.options({"train": {"seed": 7, "max_steps": None}})
        for step in (start + 10, start + 15):  # of which a killed run has not saved the second
            board.scalars({"loss": loss}, step)
        board.close(finished=start == 10)
        (row,) = table(tmp_path)
        assert row.hparams["train.seed"].number_value == 7 and "train.max_steps" not in row.hparams
        assert [metric.value for metric in row.metric_values] == [loss]
        over = api_pb2.STATUS_SUCCESS if start else api_pb2.STATUS_UNKNOWN
        assert [session.status for session in row.sessions] == [over]
    read = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in read.Scalars("loss")] == [10, 20, 25], "none is lost and none told twice"
