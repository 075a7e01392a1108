"""Two volumes of one scan, whatever it went through, are told from two people with like thumbnails."""

import itertools

import numpy as np
import pytest
from test_leakage import DISGUISES, similarity

from cohort.fingerprints import make_thumbnail
from cohort.leakage import ALIKE, likely_turns
from cohort.phantom import make_phantom
from cohort.preprocess import normalise_volume
from cohort.verify import SAME_VOLUME, compare_volumes, find_details, trim_background, turn_volumes


@pytest.fixture(scope="module")
def coarse_heads():
    """FLAIR volumes (20, 36, 36) of four phantoms at 8 x 6 x 6 mm, whose thumbnails are alike."""
    phantoms = [make_phantom(seed, (20, 36, 36), (8.0, 6.0, 6.0), "external") for seed in (22, 23, 24, 25)]
    return [phantom.modalities["flair"].astype(np.float64) for phantom in phantoms]


def compare(one, other, every_turn=False):
    pair = [np.float32(volume) for volume in (one, other)]
    turns = None if every_turn else likely_turns(*map(make_thumbnail, pair))
    return compare_volumes(*(normalise_volume(volume[None])[0][0] for volume in pair), turns)


def test_different_people_with_like_thumbnails_are_two(coarse_heads):
    pairs = list(itertools.combinations(coarse_heads, 2))
    assert max(similarity(*pair) for pair in pairs) >= ALIKE  # which stopped training
    assert max(compare(*pair) for pair in pairs) < SAME_VOLUME


@pytest.mark.parametrize("name", DISGUISES)
def test_a_disguised_scan_is_verified(coarse_heads, name):
    head = coarse_heads[0]
    # the thumbnail of so coarse a head changes with the box around it and then does not name the turn
    every_turn = name in ("cropped to the head", "padded")
    assert compare(head, DISGUISES[name](head), every_turn) >= SAME_VOLUME


def test_half_the_resolution_is_compared_head_to_head():
    head = make_phantom(3, (40, 120, 120), (4.0, 2.0, 2.0), "internal").modalities["flair"].astype(np.float64)
    other = (
        make_phantom(4, (40, 120, 120), (4.0, 2.0, 2.0), "internal").modalities["flair"].astype(np.float64)
    )
    assert compare(head, head[:, ::2, ::2]) > 2 * compare(other, head[:, ::2, ::2])


def test_constant_volumes_are_like_nothing():
    flat, noise = np.ones((8, 9, 10)), np.random.default_rng(0).normal(size=(8, 9, 10))
    assert compare_volumes(flat, flat) == 0
    assert compare_volumes(flat, noise) == 0


def test_details_are_alike_after_any_increasing_change(coarse_heads):
    head = coarse_heads[0] - coarse_heads[0].min()
    for changed in (head**2, np.sqrt(head), 3 * head - 7):
        assert np.allclose(find_details(changed)[0], find_details(head)[0], atol=1e-4)


def test_the_background_is_trimmed_to_a_margin():
    volume = np.zeros((20, 20, 20))
    volume[8:10, 9, 5:16] = 1
    assert trim_background(volume).shape == (2 + 8, 1 + 8, 11 + 8)
    assert trim_background(np.zeros((3, 3, 3))).shape == (3, 3, 3)


def test_turns_are_all_ways_to_mirror_and_to_swap_once():
    volume = np.arange(2 * 3 * 3).reshape(2, 3, 3)
    assert len({turned.tobytes() for (turned,) in turn_volumes(volume)}) == 16
