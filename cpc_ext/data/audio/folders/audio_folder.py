"""Any tree of recordings as a data set, decoded once into a memory-mapped cache.

A sub-folder is a speaker; folders named train and test or validation are splits (see file_tree). The cache's key
changes with the files, so that a changed tree is decoded again (see decoded_cache).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cpc_ext.data.audio.dataset import SpeechDataset
from cpc_ext.data.audio.decode import read_recordings
from cpc_ext.data.audio.decoded import decoded_recordings
from cpc_ext.data.file_tree import TreeFile
from cpc_ext.data.notice import tell
from cpc_ext.data.splits import class_names, hold_out


def load(data_dir: str | Path) -> SpeechDataset:
    """Open a tree of recordings, in any format, rate and number of channels that libsndfile reads.

    Splits and speakers are found as splits and classes are for a folder of images. A training and a test folder next to
    each other are the splits. Without them, about a tenth of each speaker's recordings is held out for testing; the
    choice depends on each recording's path alone. Speakers are known if every recording lies in one of at least two
    folders; those of the test recordings only if all of them are trained on. There are no phones. Unlabelled recordings
    are left out.

    A warning says what had to be guessed about the tree, and which files were left out and why. Of several processes
    only rank 0 warns.

    Decoding takes 32 KB for each second in the cache folder (see cache_dir). Raises ImportError if soundfile or soxr is
    missing, FileNotFoundError, NotADirectoryError or PermissionError for the tree, ValueError if it holds no readable
    recording, OSError if the cache cannot be written.
    """
    root = Path(data_dir).expanduser()
    tree = read_recordings(root)
    training, testing = tree.train, tree.test
    if not testing:
        training, testing = hold_out(tree.train)
        tree.notes.append(
            f"no folder of test recordings: {len(testing)} of {len(tree.train)} recordings, about a tenth of each "
            "speaker's, are held out"
        )
    speakers = class_names(root, training, testing, "recordings", tree.notes, alike=False)
    training, testing = _by_speaker(training), _by_speaker(testing)
    for file in tree.unlabeled:
        # Most models of speech choose windows by speaker, and the speakers of these are not known.
        tree.left_out.add(file.path, "in an unlabelled folder, of which only data sets of images make use")
    decoded = decoded_recordings(root, training, testing, tree.left_out, tree.notes, variant="audio-folder")
    strangers = {file.label for file in testing} - set(speakers)
    named = len(strangers - {""})
    if speakers and named:
        tree.notes.append(
            f"{named} speakers of the test recordings are not trained on, so telling speakers is not tested"
        )
    tell(root, [*tree.notes, *tree.left_out.lines()])
    names = [file.path for file in decoded.files]
    numbers = {speaker: number for number, speaker in enumerate(speakers)}
    known = [numbers.get(file.label, -1) for file in decoded.files] if speakers else None
    test = decoded.part(range(len(training), len(names)), names, None if strangers else known)
    return SpeechDataset(
        name="audio-folder",
        train=decoded.part(range(len(training)), names, known),
        test=test if len(test) else None,
        speakers=speakers,
    )


def _by_speaker(files: Sequence[TreeFile]) -> list[TreeFile]:
    """Return the files sorted by speaker, each speaker's in the order of the tree."""
    return sorted(files, key=lambda file: file.label)
