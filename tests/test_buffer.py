import pytest
import torch

from utils import Buffer, get_stacked_resids, iter_rows


@pytest.fixture
def buffer(cfg, models, tokens):
    return Buffer(cfg, models, tokens[:21])  # 21 * 127 = 2,667 rows for 1,024 slots


def serve(buffer):
    """The next batch and the numbers of its rows."""
    if buffer.pointer >= buffer.size / 2:
        buffer.refresh()
    numbers = buffer.row_numbers[buffer.order[buffer.pointer : buffer.pointer + buffer.cfg["batch_size"]]]
    return buffer.next(), numbers


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


def test_no_tail_of_the_text_is_left_out_when_it_begins_again(buffer):
    served = []
    while buffer.next_row < 2 * buffer.rows_per_epoch:
        served.append(serve(buffer)[1])
    numbers = torch.cat([*served, buffer.row_numbers[buffer.order[buffer.pointer :]]]).sort().values
    assert torch.equal(numbers, torch.arange(buffer.next_row)) and buffer.rows_per_epoch % 512


def test_rows_are_served_in_random_order(buffer):
    numbers = serve(buffer)[1]
    assert numbers.max() > 512 and not torch.equal(numbers, numbers.sort().values)


def test_replayed_rows_are_counted_from_the_second_epoch_on(buffer):
    while buffer.next_row < buffer.rows_per_epoch:
        buffer.next()
        if buffer.next_row <= buffer.rows_per_epoch:
            assert buffer.rows_replayed == 0
    for _ in range(20):
        buffer.next()
    assert 0 < buffer.rows_replayed < buffer.rows_served


def test_a_refill_takes_exactly_the_served_slots_and_no_second_buffer(buffer):
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
    first = get_stacked_resids(models, buffer.all_tokens[:1], cfg)[0, 0]  # the same for all rows: BOS
    assert ((buffer.buffer - first).flatten(1).norm(dim=1) > 1).all()


def test_too_little_text_for_one_fill_is_refused(cfg, models, tokens):
    with pytest.raises(ValueError, match="buffer_mult=16.*1,024 rows.*1,016 in the text"):
        Buffer(cfg, models, tokens[:8])


def test_the_same_seed_serves_the_same_rows(cfg, models, tokens, buffer):
    again, other = Buffer(cfg, models, tokens[:21]), Buffer({**cfg, "seed": 1}, models, tokens[:21])
    batch = buffer.next()
    assert torch.equal(batch, again.next()) and not torch.equal(batch, other.next())


def test_ignored_tokens_are_neither_served_nor_evaluated(cfg, models, tokens):
    common = tokens[:60].flatten().long().bincount().argsort(descending=True)[:3].tolist()
    cfg = {**cfg, "ignore_tokens": ",".join(map(str, common))}
    buffer, served = Buffer(cfg, models, tokens[:60]), []
    for _ in range(40):
        rows, numbers = serve(buffer)
        served += numbers.tolist()
        seq, position = divmod(served[-1], 127)
        wanted = get_stacked_resids(models, tokens[seq : seq + 1], cfg)[0, position + 1]
        assert torch.allclose(rows[-1], wanted, atol=1e-4)
    ids = tokens[:60, 1:].flatten().long()
    assert len(set(served)) == len(served) == 40 * 64
    assert not set(ids[served].tolist()) & set(common)
    used = sum(number not in common for number in ids[: buffer.next_row].tolist())
    assert used == buffer.rows_served + buffer.size - buffer.pointer
    n = sum(len(rows) for rows in iter_rows(models, tokens[:8], cfg))
    assert n == sum(id not in common for id in tokens[:8, 1:].flatten().tolist()) < 8 * 127
    with pytest.raises(ValueError, match="^ignore_tokens=.*too little text is left"):
        Buffer({**cfg, "ignore_tokens": ",".join(map(str, range(4096)))}, models, tokens[:60])
