"""Claims about augmentation: crops are windows of padded images, half are flipped, chance belongs to seed and epoch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.augmentation import PADDING, crop_flip, draw
from pipeline.batches import Order
from pipeline.data import Images


def some_images(count: int, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def draws(count: int, seed: int = 0) -> Tensor:
    return draw(count, torch.Generator().manual_seed(seed))


def one_by_one(images: Tensor, chosen: Tensor) -> Tensor:
    """What `crop_flip` does, an image and a pixel row at a time."""
    height, width = images.shape[2:]
    result = torch.zeros_like(images)
    for image, out, (down, right, flipped) in zip(images, result, chosen.tolist(), strict=True):
        for y in range(height):
            for x in range(width):
                row, column = y + down - PADDING, x + right - PADDING
                if 0 <= row < height and 0 <= column < width:
                    out[:, y, width - 1 - x if flipped else x] = image[:, row, column]
    return result


def test_the_batch_is_what_a_loop_over_images_makes() -> None:
    images, chosen = some_images(40), draws(40)
    chosen[0], chosen[1] = torch.tensor([0, 0, 0]), torch.tensor([2 * PADDING, 2 * PADDING, 1])
    made = crop_flip(images, chosen)
    assert made.dtype == torch.uint8 and torch.equal(made, one_by_one(images, chosen))


def test_the_middle_crop_is_the_image_and_its_mirror_image() -> None:
    images = some_images(2)
    chosen = torch.tensor([[PADDING, PADDING, 0], [PADDING, PADDING, 1]])
    assert torch.equal(crop_flip(images, chosen), torch.stack((images[0], images[1].flip(2))))


def test_all_crops_are_drawn_equally_often_and_half_are_flipped() -> None:
    chosen = draws(81_000)
    places = (chosen[:, 0] * (2 * PADDING + 1) + chosen[:, 1]).bincount()
    assert len(places) == 81 and (places - 1000).abs().max() < 160  # five standard deviations
    assert chosen[:, 2].double().mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("sizes", [[7, 7, 7, 9], [1, 20, 9], [15, 15]])
def test_batches_do_not_depend_on_their_size_nor_on_where_a_run_was_resumed(sizes: list[int]) -> None:
    split = Images(
        some_images(12), torch.arange(12), True, mean=torch.ones(3) / 2, std=torch.ones(3), task="classification"
    )

    def batches(sizes: list[int], position: int = 0) -> tuple[Tensor, Tensor]:
        order, drawn = Order(12, 3), Order(12, 3, make=draw, purpose="augmentation")
        parts = []
        for size in sizes:
            parts.append(split.batch(order.next(position, size), drawn.next(position, size)))
            position += size
        return torch.cat([inputs for inputs, _ in parts]), torch.cat([targets for _, targets in parts])

    whole, again, resumed = batches([30]), batches(sizes), batches(sizes[1:], sizes[0])
    for one, other, rest in zip(whole, again, resumed, strict=True):
        assert torch.equal(one, other) and torch.equal(one[sizes[0] :], rest)
    assert not torch.equal(whole[0][:12].sort(0).values, whole[0][12:24].sort(0).values)  # another epoch, other crops


def test_crops_and_order_are_drawn_apart() -> None:
    def drawn(**fields: Any) -> Tensor:
        return Order(50, 3, **fields).next(0, 50)

    assert torch.equal(drawn(make=draw, purpose="augmentation"), drawn(make=draw, purpose="augmentation"))
    assert not torch.equal(drawn(make=draw, purpose="augmentation"), drawn(make=draw))
    assert drawn(make=draw, purpose="augmentation").shape == (50, 3)


def test_images_are_normalised_after_the_crop_so_that_padding_is_black() -> None:
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.25, 0.0]), torch.tensor([0.5, 0.25, 2.0])
    split = Images(white, torch.tensor([4]), True, mean=mean, std=std, task="classification")
    inputs, targets = split.batch(torch.tensor([0]), torch.tensor([[0, 0, 0]]))
    assert targets.tolist() == [4] and inputs.dtype == torch.float32
    torch.testing.assert_close(inputs[0, :, 0, 0], -mean / std)
    torch.testing.assert_close(inputs[0, :, -1, -1], (1 - mean) / std)


def test_an_autoencoder_gets_pixels_between_0_and_1_as_inputs_and_targets() -> None:
    images = some_images(5)
    split = Images(images, torch.arange(5), mean=torch.ones(3), std=torch.ones(3), task="autoencoder")
    inputs, targets = split.batch(torch.tensor([3, 1]))
    assert torch.equal(inputs, images[[3, 1]].flatten(1).float() / 255) and torch.equal(inputs, targets)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_on_a_gpu_is_the_same_and_waits_for_nothing() -> None:
    images, chosen = some_images(256, 32), draws(256)
    split = Images(images, torch.arange(256), True, mean=torch.ones(3) / 3, std=torch.ones(3), task="classification")
    order, drawn = Order(256, 0, "cuda"), Order(256, 0, "cuda", "augmentation", draw)
    there = split.to("cuda")
    there.batch(order.next(0, 64), drawn.next(0, 64))
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs, _ = there.batch(order.next(192, 128), drawn.next(192, 128))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    here, drawn = Order(256, 0), Order(256, 0, make=draw, purpose="augmentation")
    torch.testing.assert_close(inputs.cpu(), split.batch(here.next(192, 128), drawn.next(192, 128))[0])
    assert torch.equal(crop_flip(images.cuda(), chosen.cuda()).cpu(), crop_flip(images, chosen))
