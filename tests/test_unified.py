"""UniVLC against a plain loop, the queue as a list, two ranks against one, and momentum copies."""

import pytest
import torch
from gloo import on_two_ranks
from torch import nn

from vidl.nn import Momentum
from vidl.objectives import Queue, UnifiedContrastiveLoss, hard_negatives

B, C, QUEUE = 4, 5, 10
# Two numbers of a sample: its clip, and its text.
IDS = torch.tensor([[1, 20], [2, 21], [1, 22], [3, 21]])


def features(seed, B=B):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, C, generator=generator, dtype=torch.float64) for _ in range(4)]


def plain_loss(video, text, ids, keys_of_video, keys_of_text, ids_of_keys, temperature):
    """The formula, sample by sample; keys are those of the batch and of the queue."""
    total = 0
    for queries, keys in ((video, keys_of_text), (text, keys_of_video)):
        for i in range(len(queries)):
            scores = torch.stack([torch.cosine_similarity(queries[i], key, 0) for key in keys])
            log = (scores / temperature).log_softmax(0)
            same = [
                j for j, other in enumerate(ids_of_keys)
                if any(a == b for a, b in zip(ids[i], other, strict=True))
            ]  # fmt: skip
            total = total - sum(log[j] for j in same) / len(same)
    return total / len(video) / 2


def test_without_a_queue_all_of_a_text_are_positives():
    video, text, *_ = (x.requires_grad_() for x in features(0))
    loss = UnifiedContrastiveLoss().double()
    ours = loss(video, text, IDS)
    rows = IDS.tolist()
    plain = plain_loss(video, text, rows, video, text, rows, loss.temperature[0])
    torch.testing.assert_close(ours, plain)
    leaves = [video, text, loss.temperature]
    for one, other in zip(*(torch.autograd.grad(x, leaves) for x in (ours, plain)), strict=True):
        torch.testing.assert_close(one, other)


def test_with_a_queue():
    """Three batches fill a queue of ten rows and wrap; each loss has a gradient by its queries."""
    loss = UnifiedContrastiveLoss(queue=QUEUE, dim=C, numbers=2).double()
    earlier: list = []
    for step in range(4):
        video, text, slow_video, slow_text = features(step)
        leaves = [video.requires_grad_(), text.requires_grad_(), loss.temperature]
        ids = IDS + torch.tensor([[0, step], [step, 0], [0, 0], [9, 1]])
        ours = loss(video, text, ids, (slow_video, slow_text))
        own = list(zip(slow_video, slow_text, ids.tolist(), strict=True))
        of_video, of_text, numbers = zip(*own, *earlier, strict=True)
        plain = plain_loss(
            video, text, ids.tolist(), of_video, of_text, numbers, loss.temperature[0]
        )
        torch.testing.assert_close(ours, plain)
        for one, other in zip(
            *(torch.autograd.grad(x, leaves) for x in (ours, plain)), strict=True
        ):
            torch.testing.assert_close(one, other)
        earlier = [*earlier, *own][-QUEUE:]
    assert int(loss.queue.pushed) == 16 and loss.queue.filled.all()
    before = loss.queue.video.clone()
    loss.eval()(video, text, IDS, (slow_video, slow_text))
    assert torch.equal(loss.queue.video, before), "evaluation adds nothing"


def test_the_queue_is_first_in_first_out():
    queue, rows = Queue(5, 2), []
    for step in range(4):
        batch = torch.full((2, 2), float(step))
        queue.push(batch, -batch, torch.full((2, 1), step))
        rows = [*rows, step, step][-5:]
        assert sorted(queue.ids[queue.filled, 0].tolist()) == rows
        assert sorted(queue.video[queue.filled, 0].tolist()) == rows
    assert torch.equal(queue.text, -queue.video) and set(queue.state_dict()) == {
        "video", "text", "ids", "pushed"
    }  # fmt: skip
    with pytest.raises(ValueError, match="need a queue of at least 6 samples, .*, got 5"):
        queue.push(torch.zeros(6, 2), torch.zeros(6, 2), torch.zeros(6, 1, dtype=torch.int64))


def test_negatives_share_no_number():
    similarity = torch.full((B, B), -50.0).fill_diagonal_(50.0)
    ids = torch.tensor([[1, 20], [2, 21], [1, 22], [3, 20]])
    for step in range(20):
        negatives = hard_negatives(0, step, torch.arange(B), similarity, ids)
        for i, (caption, clip) in enumerate(
            zip(negatives.captions.tolist(), negatives.clips.tolist(), strict=True)
        ):
            assert not (ids[i] == ids[caption]).any() and not (ids[i] == ids[clip]).any()
    same = torch.tensor([[1, 20], [1, 21], [2, 20]])
    negatives = hard_negatives(0, 0, torch.arange(3), torch.zeros(3, 3), same)
    assert negatives.exist.tolist() == [False, True, True]


class Slow(nn.Module):
    def __init__(self, queue, gather):
        super().__init__()
        torch.manual_seed(3)
        self.video, self.text = nn.Linear(C, C), nn.Linear(C, C)
        self.loss = UnifiedContrastiveLoss(queue=queue, dim=C, numbers=2, gather=gather)

    def forward(self, video, text, ids, keys):
        return self.loss(self.video(video), self.text(text), ids, keys)


def steps(model, rows):
    """Three steps on these rows of the batches: losses, the last gradients, and the queue."""
    losses = []
    for step in range(3):
        video, text, *keys = (x.float()[rows] for x in features(step))
        model.zero_grad()
        loss = model(video, text, (IDS + step)[rows], tuple(keys))
        loss.backward()
        losses.append(loss.detach())
    grads = [p.grad for p in model.parameters()]
    inner = getattr(model, "module", model)
    return losses, grads, inner.loss.queue.state_dict()


def _rank(rank, folder):
    model = nn.parallel.DistributedDataParallel(Slow(QUEUE, True), broadcast_buffers=False)
    torch.save(steps(model, slice(2 * rank, 2 * rank + 2)), f"{folder}/{rank}.pt")


def test_two_ranks_equal_one_with_twice_the_batch(tmp_path):
    on_two_ranks(_rank, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    losses, grads, queue = steps(Slow(QUEUE, False), slice(None))
    for step, loss in enumerate(losses):
        torch.testing.assert_close((ranks[0][0][step] + ranks[1][0][step]) / 2, loss)
    for _, theirs, other in ranks:
        for one, own in zip(theirs, grads, strict=True):
            torch.testing.assert_close(one, own)
        for name, rows in queue.items():
            assert torch.equal(other[name], rows), name


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        self.slow = Momentum(0.9, one=nn.Linear(2, 3), other=nn.Sequential(nn.Linear(3, 3)))


def test_momentum_copies_follow():
    model = Parts().train()
    assert not model.slow.training and not model.slow.one.training
    assert not any(p.requires_grad for p in model.slow.parameters())
    model.slow.start(model)
    expected = {name: p.clone() for name, p in model.slow.named_parameters()}
    assert set(expected) == {"one.weight", "one.bias", "other.0.weight", "other.0.bias"}
    for _ in range(3):
        for parameter in (*model.one.parameters(), *model.other.parameters()):
            parameter.data += torch.randn_like(parameter)
        model.slow.update(model)
        expected = {name: 0.9 * x + 0.1 * model.get_parameter(name) for name, x in expected.items()}
    for name, parameter in model.slow.named_parameters():
        torch.testing.assert_close(parameter, expected[name])


def test_misuse_is_explained():
    loss = UnifiedContrastiveLoss(queue=QUEUE, dim=C, numbers=2).double()
    video, text, *keys = features(0)
    with pytest.raises(ValueError, match="need keys and clip_ids with a queue"):
        loss(video, text, IDS)
    with pytest.raises(ValueError, match="keys"):
        loss(video, text, IDS, (keys[0][:2], keys[1]))
    with pytest.raises(ValueError, match="ids"):
        loss(video, text, IDS[:, :1], tuple(keys))
    with pytest.raises(ValueError, match="clip_ids"):
        loss(video, text, IDS[:3], tuple(keys))
    with pytest.raises(ValueError, match="queue"):
        UnifiedContrastiveLoss(queue=-1)
    for rate in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="rate"):
            Momentum(rate, one=nn.Linear(1, 1))
