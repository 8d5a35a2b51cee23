"""The predicted time of drawing a pixel: how it scales, and the target that the kernel was written for."""

from cuda_machines import H100
from cuda_sampling import BARRIER, predict

from cpc_ext.models import PixelCNNPP


def test_a_pixel_is_within_its_bar_and_grows_with_images_and_blocks():
    model = PixelCNNPP(3, channels=40, blocks=2)
    assert sum(parameter.numel() for parameter in model.parameters()) // 10**4 == 151
    one, few, many = (predict(H100, model, images, 32) for images in (1, 16, 256))
    # Twelve steps at every pixel, twelve that wait at one of four, ten at one of sixteen.
    assert one.steps > (12 + 12 / 4 + 10 / 16) * BARRIER
    assert one.seconds <= few.seconds < many.seconds
    assert few.seconds < 0.25e-3
    deeper = predict(H100, PixelCNNPP(3, channels=40, blocks=4), 16, 32)
    assert 1.5 < deeper.steps / few.steps < 2
