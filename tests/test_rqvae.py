"""The tokenizer: losses by hand, starts, round trips, and the report; its quantizer has tests of its own."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.compute import make_optimizer
from models.quantizer import kmeans, nearest
from models.rqvae import AlignAt, Alignment, RqVae, RqVaeConfig, alignment_loss, resolve_collisions
from tools.errors import BadInput
from tools.tokenizer_report import code_use, collision_groups

CONFIG = RqVaeConfig(features=12, width=8, hidden=(16,), levels=3, codebook_size=6, dropout=0.0)


def features(rows: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed))


def test_balanced_kmeans_uses_every_code_alike() -> None:
    vectors = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))

    def perplexity(balance: float) -> float:
        generator = torch.Generator().manual_seed(0)
        centres = kmeans(vectors, 32, iterations=20, generator=generator, balance=balance)
        return code_use(nearest(vectors, centres).unsqueeze(1).numpy(), 32)[0].perplexity

    assert perplexity(0.05) > 31
    assert perplexity(0.05) > perplexity(0.0)


@pytest.mark.parametrize("shared", [False, True])
def test_start_is_residual_kmeans_on_the_features(shared: bool) -> None:
    """With the skip path the untrained autoencoder already quantises: better with each level, all codes in use."""
    data = features(400)
    model = RqVae(dataclasses.replace(CONFIG, width=12, levels=4, codebook_size=16, shared=shared))
    model.start_from(data, iterations=20, seed=0)
    model.eval()
    codes = model.codes(data)
    errors = []
    for level in range(1, 5):
        vectors = torch.stack([model.quantizer.codebook(i)[codes[:, i]] for i in range(level)]).sum(0)
        errors.append(((model.decode(vectors) - model.prepare(data)) ** 2).mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * float(((model.prepare(data) - model.mean) ** 2).mean())
    if not shared:
        assert all(use.used == 1.0 for use in code_use(codes.numpy(), 16))


@pytest.mark.parametrize("alignment", ["none", "mse", "l1", "contrastive"])
@pytest.mark.parametrize("align_at", ["before", "after"])
@pytest.mark.parametrize("skip", [False, True])
def test_every_parameter_learns(alignment: Alignment, align_at: AlignAt, skip: bool) -> None:
    config = dataclasses.replace(CONFIG, width=12, alignment=alignment, align_at=align_at, skip=skip)
    model = RqVae(config)
    model.start_from(features(), iterations=5, seed=0)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = make_optimizer("adam", model, lr=1e-3, weight_decay=0.0)
    first = last = 0.0
    for step in range(60):
        loss = model(features(), features(seed=1)).total(0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert last < first or skip  # a start from k-means is as good as 60 steps get it
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert still == []


def test_alignment_losses_by_hand() -> None:
    output, captions = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert alignment_loss("mse", output, captions).item() == pytest.approx(1.0)
    assert alignment_loss("l1", output, captions).item() == pytest.approx(0.5)
    expected = -np.log(np.e / (np.e + 1))  # cosines 1 and 0, temperature 1
    assert alignment_loss("contrastive", output, captions).item() == pytest.approx(expected)
    assert alignment_loss("none", output, captions).item() == 0.0


def test_align_before_needs_equal_widths() -> None:
    with pytest.raises(BadInput, match="`align_at` before"):
        dataclasses.replace(CONFIG, alignment="mse", align_at="before")


def test_save_and_load_give_equal_codes(tmp_path: Path) -> None:
    model = RqVae(CONFIG)
    model.start_from(features(), iterations=3, seed=0)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(RqVae.from_pretrained(tmp_path).codes(features()), model.eval().codes(features()))


def test_optimizers_by_name() -> None:
    model = RqVae(CONFIG)
    for name in ("adamw", "Adagrad", "SGD", "RMSprop", "NAdam"):
        assert type(make_optimizer(name, model, lr=0.1, weight_decay=0.0)).__name__.lower() == name.lower()
        make_optimizer(name, model, lr=0.1, weight_decay=0.0, fused=True)  # also where there is no such form
    assert make_optimizer("adamw", model, lr=0.1, weight_decay=0.0, fused=True).defaults["fused"]
    with pytest.raises(BadInput, match=r"`optimizer` adamm is not in torch\.optim"):
        make_optimizer("adamm", model, lr=0.1, weight_decay=0.0)


def test_code_use_by_hand() -> None:
    codes = np.array([[0, 1], [0, 2], [0, 3], [0, 3]])
    first, second = code_use(codes, 4)
    assert (first.used, first.perplexity) == (0.25, 1.0)
    assert second.used == 0.75
    assert second.perplexity == pytest.approx(round(2**1.5, 1))
    assert collision_groups(codes).tolist() == [1, 1, 2, 2]


def test_resolving_collisions_keeps_the_nearest_and_moves_the_others() -> None:
    config = dataclasses.replace(CONFIG, features=2, width=2, levels=2, codebook_size=4, skip=False)
    model = RqVae(config).eval()
    with torch.no_grad():
        model.quantizer.codebooks[0] = torch.tensor([[0.0, 0.0], [9.0, 9.0], [99.0, 0.0], [0.0, 99.0]])
        model.quantizer.codebooks[1] = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    latents = np.array([[0.3, 0.0], [0.1, 0.0], [0.2, 0.0], [1.0, 0.0], [9.0, 9.0]], dtype=np.float32)
    codes = model.quantizer.encode(torch.from_numpy(latents)).numpy()
    assert codes.tolist() == [[0, 0], [0, 0], [0, 0], [0, 1], [1, 0]]
    resolved = resolve_collisions(codes, latents, model, [np.arange(5)])
    assert resolved.tolist() == [[0, 3], [0, 0], [0, 2], [0, 1], [1, 0]]  # nearest first: 0.1, 0.2, 0.3


def test_train_codes_do_not_depend_on_the_pictures_after_them() -> None:
    config = dataclasses.replace(CONFIG, features=4, width=4, levels=2, codebook_size=24, skip=False)
    model = RqVae(config).eval()
    latents = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).numpy()
    codes = model.quantizer.encode(torch.from_numpy(latents)).numpy()
    train, rest = np.arange(40), np.arange(40, 60)
    resolved = resolve_collisions(codes, latents, model, [train, rest])
    alone = resolve_collisions(codes[:40], latents[:40], model, [train])
    assert resolved[:40].tolist() == alone.tolist()
    assert (collision_groups(codes) > 1).any()
    assert (collision_groups(resolved) == 1).all()  # no prefix has more than 24 pictures behind it


def test_codes_that_others_have_are_taken() -> None:
    """Resolving pictures beside the codes of others is resolving both, the others first."""
    config = dataclasses.replace(CONFIG, features=4, width=4, levels=3, codebook_size=12, skip=False)
    model = RqVae(config).eval()
    latents = (0.1 * torch.randn(80, 4, generator=torch.Generator().manual_seed(0))).numpy()
    codes = model.quantizer.encode(torch.from_numpy(latents)).numpy()
    first, then = np.arange(50), np.arange(50, 80)
    both = resolve_collisions(codes, latents, model, [first, then])
    beside = resolve_collisions(
        codes[50:], latents[50:], model, [np.arange(30)], taken=lambda prefixes: both[:50].astype(np.int16)
    )
    assert beside.tolist() == both[50:].tolist()
    assert beside.tolist() != resolve_collisions(codes[50:], latents[50:], model, [np.arange(30)]).tolist()


def test_a_group_larger_than_the_codebook_keeps_collisions() -> None:
    model = RqVae(dataclasses.replace(CONFIG, features=2, width=2, levels=1, codebook_size=2, skip=False)).eval()
    latents = np.zeros((3, 2), dtype=np.float32)
    codes = resolve_collisions(np.zeros((3, 1), dtype=np.int64), latents, model, [np.arange(3)])
    assert sorted(codes.ravel().tolist()) == [0, 0, 1]
