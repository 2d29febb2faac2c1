"""Three families that are no language models learn inside the context: structure in the inputs, held-out data right.

The labels follow a rule of the inputs, so that a falling loss alone does not pass: accuracy on unseen inputs does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from tests.training.models import VOCAB, seeded
from tests.training.oracle import HOMES, Oracle, adamw, assert_same_bits, enable, weights_of

Batch = dict[str, Tensor]

SHAPES: Final = 4
NUM_USERS, NUM_ITEMS, NUM_TAGS = 40, 60, 30


class Family(NamedTuple):
    build: Callable[[], nn.Module]
    """forward(**inputs) gives logits."""
    batch: Callable[[int, int], tuple[Batch, Tensor]]
    """(inputs, labels) of a seed and a size."""
    num_steps: int
    lr: float
    least_accuracy: float
    """On unseen inputs; chance is a half or less."""


# ---------------------------------------------------------------------------------------------- images, BatchNorm


class ConvNet(nn.Module):
    """Two convolutions with BatchNorm: running statistics are buffers that forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Linear(64, SHAPES)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(pixels).flatten(1))
        return logits


def shapes(seed: int, size: int) -> tuple[Batch, Tensor]:
    """Noisy pictures of rows, columns, diagonals or a square at a random place."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, SHAPES, (size,), generator=rng)
    pixels = 0.3 * torch.randn(size, 1, 12, 12, generator=rng)
    at = torch.randint(1, 8, (size, 2), generator=rng).tolist()
    for picture, label, (row, column) in zip(pixels[:, 0], labels.tolist(), at, strict=True):
        if label == 0:
            picture[row] += 2.0
        elif label == 1:
            picture[:, column] += 2.0
        elif label == 2:
            picture += 2.0 * torch.eye(12)
        else:
            picture[row : row + 4, column : column + 4] += 2.0
    return {"pixels": pixels}, labels


# ----------------------------------------------------------------------------------------------- recommendations


class Recommender(nn.Module):
    """Embedding bags of user, item and tags; an MLP over them, their products and dense features."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.EmbeddingBag(NUM_USERS, 16, mode="sum")
        self.item = nn.EmbeddingBag(NUM_ITEMS, 16, mode="mean")
        self.tags = nn.EmbeddingBag(NUM_TAGS, 16, mode="max")
        self.mlp = nn.Sequential(nn.Linear(4 * 16 + 3, 48), nn.ReLU(), nn.Linear(48, 2))

    def forward(self, users: Tensor, items: Tensor, tags: Tensor, tag_offsets: Tensor, dense: Tensor) -> Tensor:
        user, item, tag = self.user(users), self.item(items), self.tags(tags, tag_offsets)
        logits: Tensor = self.mlp(torch.cat([user, item, tag, user * item, dense], dim=1))
        return logits


def clicks(seed: int, size: int) -> tuple[Batch, Tensor]:
    """Who clicks often, what is clicked often, and the price: a sum of the three decides."""
    rng = torch.Generator().manual_seed(seed)
    users = torch.randint(0, NUM_USERS, (size, 1), generator=rng)
    items = torch.randint(0, NUM_ITEMS, (size, 1), generator=rng)
    lengths = torch.randint(1, 4, (size,), generator=rng)
    tags = torch.randint(0, NUM_TAGS, (int(lengths.sum()),), generator=rng)
    dense = torch.randn(size, 3, generator=rng)
    eager, popular = (users % 5 - 2.0).squeeze(1), (items % 7 - 3.0).squeeze(1)
    clicked = (eager + popular > 1.5 * dense[:, 0]).long()
    inputs = {
        "users": users, "items": items, "tags": tags, "tag_offsets": lengths.cumsum(0) - lengths, "dense": dense
    }  # fmt: skip
    return inputs, clicked


# ------------------------------------------------------------------------------------------- texts, a BERT on top


class TextClassifier(nn.Module):
    """A small BERT with a pooler and a head."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=32, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.bert = transformers.BertForSequenceClassification(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def texts(seed: int, size: int) -> tuple[Batch, Tensor]:
    """Positive where more words of one list than of the other occur; texts of several lengths, padded."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (size,), generator=rng)
    tokens = torch.randint(30, VOCAB, (size, 12), generator=rng)
    mask = torch.ones_like(tokens)
    for text, label, seen in zip(tokens, labels.tolist(), mask, strict=True):
        length = int(torch.randint(7, 13, (), generator=rng))
        telling = torch.randperm(length - 1, generator=rng)[:4] + 1
        text[telling] = torch.randint(2, 12, (4,), generator=rng) + 14 * label
        text[0] = 1
        text[length:], seen[length:] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}, labels


FAMILIES: Final = {
    "cnn": Family(ConvNet, shapes, num_steps=40, lr=1e-2, least_accuracy=0.9),
    "recommender": Family(Recommender, clicks, num_steps=100, lr=2e-2, least_accuracy=0.85),
    "bert": Family(TextClassifier, texts, num_steps=60, lr=3e-3, least_accuracy=0.9),
}


def train(family: Family, model: nn.Module, optimizer: Any) -> list[float]:
    losses = []
    for step in range(family.num_steps):
        inputs, labels = family.batch(step, 32)
        loss = F.cross_entropy(model(**inputs).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def accuracy(family: Family, model: nn.Module) -> float:
    inputs, labels = family.batch(10_000, 256)
    model.eval()
    with torch.no_grad():
        right = model(**inputs).argmax(-1) == labels
    model.train()
    return right.float().mean().item()


def assert_learned(family: Family, losses: list[float], right: float) -> None:
    fifth = family.num_steps // 5
    parts = [sum(losses[at : at + fifth]) / fifth for at in range(0, 5 * fifth, fifth)]
    assert parts[-1] < 0.5 * parts[0], parts
    assert right >= family.least_accuracy


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_learns_with_the_bits_of_memory_on_every_home(name: str, home: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    expected, model = seeded(family.build), seeded(family.build)
    wanted = train(family, expected, Oracle(adamw(expected, lr=family.lr)))
    optimizer = adamw(model, lr=family.lr)
    with enable(model, optimizer, home, tmp_path):
        losses = train(family, model, optimizer)
        right = accuracy(family, model)
    assert_learned(family, losses, right)
    assert losses == wanted
    assert right == accuracy(family, expected)
    assert_same_bits(weights_of(model), weights_of(expected))
    assert_same_bits(dict(model.named_buffers()), dict(expected.named_buffers()))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_learns_in_16_bit(name: str, precision: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = seeded(family.build)
    optimizer = adamw(model, lr=family.lr)
    losses = []
    with enable(model, optimizer, "disk", tmp_path, precision=precision) as session:
        for step in range(family.num_steps):
            inputs, labels = family.batch(step, 32)
            loss = F.cross_entropy(model(**inputs).float(), labels)
            session.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        right = accuracy(family, model)
    assert_learned(family, losses, right)
