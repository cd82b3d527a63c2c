import copy

import pytest
import torch

from utils import Buffer, get_stacked_resids


@pytest.fixture
def buffer(cfg, models, tokens):
    return Buffer(cfg, models, tokens[:21])  # 21 * 127 = 2,667 rows for 1,024 slots


def serve(buffer):
    """The next batch and the numbers of its rows."""
    if buffer.pointer >= buffer.size / 2:
        buffer.refresh()
    numbers = buffer.row_numbers[buffer.order[buffer.pointer : buffer.pointer + buffer.cfg["batch_size"]]]
    return buffer.next(), numbers


def copy_of(buffer):
    """All that refresh and next change, as it is now."""
    return copy.deepcopy({**buffer.state_dict(), "rows": buffer.buffer})


def are_equal(one, other):
    pairs = ((one[key], other[key]) for key in one.keys() | other.keys())
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_it_is_empty_until_the_first_next_fills_it(buffer):
    assert buffer.next_row == buffer.rows_served == 0 and len(buffer.peek()) == 0
    assert buffer.next().shape == (64, 4, 128)
    assert (buffer.next_row, buffer.pointer, buffer.rows_served) == (1024, 64, 64)
    assert torch.equal(buffer.row_numbers, torch.arange(1024))


def test_a_refresh_fills_it_and_a_second_one_with_nothing_served_changes_nothing(buffer):
    buffer.refresh()
    assert (buffer.next_row, buffer.pointer, buffer.rows_served) == (1024, 0, 0)
    before = copy_of(buffer)
    buffer.refresh()
    assert are_equal(copy_of(buffer), before)


def test_next_after_a_refresh_of_an_empty_buffer_is_the_same_as_without(cfg, models, tokens, buffer):
    again = Buffer(cfg, models, tokens[:21])
    again.refresh()
    for _ in range(10):
        assert torch.equal(buffer.next(), again.next())


def test_peek_is_the_next_four_batches_and_serves_none_of_them(buffer):
    buffer.next()
    before = copy_of(buffer)
    rows = buffer.peek()
    assert buffer.pointer == 64 and are_equal(copy_of(buffer), before)
    assert torch.equal(rows, torch.cat([buffer.next() for _ in range(4)]))


def test_peek_is_less_where_less_is_left(cfg, models, tokens):
    buffer = Buffer({**cfg, "buffer_mult": 3}, models, tokens[:21])
    first, second = buffer.next(), buffer.peek()
    assert len(first) == 64 and torch.equal(second, buffer.buffer[buffer.order[64:]])


def test_each_row_is_the_activation_at_its_sequence_and_position(buffer, models, cfg):
    everything = get_stacked_resids(models, buffer.all_tokens, cfg)
    for _ in range(40):  # through several refills and into the second epoch
        x, numbers = serve(buffer)
        seqs, positions = numbers // 127 % 21, numbers % 127 + 1
        assert torch.allclose(x, everything[seqs, positions], atol=1e-5)
    assert buffer.next_row // buffer.rows_per_epoch == 1


def test_over_three_refills_every_row_is_served_once_before_any_is_served_twice(buffer):
    served = torch.cat([serve(buffer)[1] for _ in range(3 * 8)])
    waiting = buffer.row_numbers[buffer.order[buffer.pointer :]]
    numbers = torch.cat([served, waiting]).sort().values
    assert torch.equal(numbers, torch.arange(buffer.next_row)) and len(served) == 3 * 512


def test_half_of_it_is_always_there_to_be_mixed_with_what_comes(buffer):
    for n in range(1, 60):
        before = buffer.pointer
        buffer.next()
        assert buffer.size - (buffer.pointer - 64) > buffer.size / 2  # what the batch was drawn from
        assert buffer.next_row == 1024 + (n - 1) // 8 * 512
        assert buffer.pointer == (64 if before in (512, 1024) else before + 64)


def test_each_pass_ends_with_a_sequence_but_for_the_last_of_a_refill(cfg, models, tokens):
    buffer = Buffer({**cfg, "buffer_mult": 13, "model_batch_size": 2}, models, tokens[:21])
    ends = {0}
    for _ in range(50):
        buffer.next()
        ends.add(buffer.next_row)
    assert all(bound in ends or bound % 127 == 0 for bound in buffer.bounds)
    for start, end in zip(buffer.bounds, buffer.bounds[1:]):
        n_seqs = (end - 1) // 127 - start // 127 + 1
        assert n_seqs == 2 or n_seqs < 2 and end in ends


def test_no_tail_of_the_text_is_left_out_when_it_begins_again(buffer):
    served = []
    while buffer.next_row < 2 * buffer.rows_per_epoch:
        served.append(serve(buffer)[1])
    numbers = torch.cat([*served, buffer.row_numbers[buffer.order[buffer.pointer :]]]).sort().values
    assert torch.equal(numbers, torch.arange(buffer.next_row)) and buffer.rows_per_epoch % 512


def test_rows_are_served_in_random_order(buffer):
    numbers = serve(buffer)[1]
    assert numbers.max() > 512 and not torch.equal(numbers, numbers.sort().values)


def test_a_refill_takes_exactly_the_served_slots_and_no_second_buffer(buffer):
    buffer.refresh()
    where, before, numbers = buffer.buffer.data_ptr(), buffer.buffer.clone(), buffer.row_numbers.clone()
    while buffer.pointer < buffer.size / 2:
        buffer.next()
    served = buffer.order[: buffer.pointer]
    buffer.refresh()
    kept = torch.ones(buffer.size, dtype=torch.bool)
    kept[served] = False
    assert buffer.buffer.data_ptr() == where
    assert torch.equal(buffer.buffer[kept], before[kept]) and torch.equal(buffer.row_numbers[kept], numbers[kept])
    assert (buffer.row_numbers[served] >= 1024).all() and kept.sum() == 512


def test_position_0_is_left_out(buffer, models, cfg):
    buffer.refresh()
    first = get_stacked_resids(models, buffer.all_tokens[:1], cfg)[0, 0]  # the same for all rows: BOS
    assert ((buffer.buffer - first).flatten(1).norm(dim=1) > 1).all()


def test_too_little_text_for_one_fill_is_refused(cfg, models, tokens):
    with pytest.raises(ValueError, match="buffer_mult=16.*1,024 rows.*1,016 in the text"):
        Buffer(cfg, models, tokens[:8])
    Buffer({**cfg, "batch_size": 127, "buffer_mult": 8}, models, tokens[:8]).refresh()  # just enough


def test_the_same_seed_serves_the_same_rows(cfg, models, tokens, buffer):
    again, other = Buffer(cfg, models, tokens[:21]), Buffer({**cfg, "seed": 1}, models, tokens[:21])
    batch = buffer.next()
    assert torch.equal(batch, again.next()) and not torch.equal(batch, other.next())


def test_it_goes_on_from_a_state_to_the_last_bit(cfg, models, tokens, buffer):
    for _ in range(20):  # past two refills, with rows of three ages in it
        buffer.next()
    again = Buffer(cfg, models, tokens[:21])
    again.load_state_dict(buffer.state_dict())
    assert torch.equal(again.peek(), buffer.peek())
    for _ in range(20):  # into the second epoch
        assert torch.equal(again.next(), buffer.next())
    assert again.rows_served == buffer.rows_served and buffer.next_row > buffer.rows_per_epoch


def test_a_state_of_another_text_is_refused(cfg, models, tokens, buffer):
    buffer.next()
    with pytest.raises(ValueError, match="^tokens=.*not the text of the run so far"):
        Buffer(cfg, models, tokens[1:22]).load_state_dict(buffer.state_dict())


@pytest.mark.parametrize("name, value", [
    ("pointer", 10**15), ("next_row", 10**15), ("rows_served", 0), ("order", torch.arange(10**6))])
def test_a_state_that_is_not_of_this_run_is_refused_at_once(cfg, models, tokens, buffer, name, value):
    buffer.next()
    state = buffer.state_dict()
    with pytest.raises(ValueError, match="^resume=.*its buffer's state is not one of this run"):
        Buffer(cfg, models, tokens[:21]).load_state_dict({**state, name: value})
    Buffer(cfg, models, tokens[:21]).load_state_dict(state)
