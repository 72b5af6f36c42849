"""What an evaluation works on: picture sets with their labels, and their features by every encoder and baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from export.bundle import Embeddings, RefusalError, sha256_json
from training.evaluate import copies
from training.evaluate.config import Evaluate
from training.evaluate.descriptors import BASELINES
from training.evaluate.encoders import Encoder
from training.evaluate.features import Extractor, Features, extract
from training.evaluate.metrics import Curve
from training.evaluate.pictures import Labels, PictureSet, digest, enumerate_classes, own_rows, read_set

Numbers = npt.NDArray[np.int64]


class Labelled(NamedTuple):
    """Queries and a gallery with labels, ready to be ranked."""

    queries: PictureSet
    query_rows: dict[str, Embeddings]
    query_labels: Numbers
    gallery: PictureSet
    gallery_rows: dict[str, Embeddings]
    gallery_labels: Numbers
    own: Numbers | None
    """[Q] each query's own row in the gallery, −1 where it is not there; None where no query is."""
    classes: list[str]

    @property
    def leave_one_out(self) -> bool:
        """Whether queries and gallery are one set."""
        return self.gallery is self.queries

    @property
    def searched(self) -> str:
        """What was searched, for the protocol."""
        if self.leave_one_out:
            return "leave-one-out"
        without = "" if self.own is None else ", without the query's own file"
        return f"{self.gallery.name} {self.gallery.folder}{without}"


class Inputs:
    """The sets of one evaluation with their labels and features.

    Attributes: `notes`, sentences for the reader; `unreadable`, files that were skipped; `curves`, of copy detection.
    """

    def __init__(
        self, asked: Evaluate, encoders: list[Encoder], bar: Callable[[str, int], Callable[[int], None]]
    ) -> None:
        self.asked, self.encoders, self.bar = asked, encoders, bar
        self.notes: list[str] = []
        self.unreadable: list[tuple[str, str]] = []
        self.curves: dict[str, Curve] = {}
        self.data = read_set("data", asked.data, self.unreadable)
        self.bank = None if asked.bank is None else read_set("bank", asked.bank, self.unreadable)
        self.gallery = None if asked.gallery is None else read_set("gallery", asked.gallery, self.unreadable)
        self.labels = Labels(asked.labels)
        self.roles = None if self.gallery or self.bank or asked.pairs else copies.roles(self.data.pictures)
        self.ranked: Labelled | None = None  # of the last task with labels, for the plots
        self._features: dict[tuple[str, bool], Features] = {}
        spec = encoders[0].extractor.spec
        fresh = encoders[0].untrained if asked.baselines else None
        beside = BASELINES if asked.baselines else {}
        self.baselines = [Extractor(name, sha256_json(["baseline", name]), spec, f) for name, f in beside.items()]
        self.extractors = [*(e.extractor for e in encoders), *([fresh()] if fresh else []), *self.baselines]
        if fresh is None and asked.baselines:
            self.notes.append(
                f"{encoders[0].extractor.name} is a bundle: no untrained network of its architecture is measured beside it "
                "(evaluate the run for that)"
            )

    def about_data(self) -> dict[str, Any]:
        """Folders, counts and digests for results.json."""
        sets = [s for s in (self.data, self.bank, self.gallery) if s is not None]
        return {
            s.name: {"folder": str(s.folder), "pictures": len(s.pictures), "sha256": digest(s.pictures)} for s in sets
        }

    # --- features -----------------------------------------------------------------------------------------------

    def features_of(
        self, pictures: PictureSet, extractors: list[Extractor] | None = None, whole: bool = False
    ) -> Features:
        """Features of a set, made once; `whole` keeps apart those of whole pictures."""
        key = f"{pictures.name}/{digest(pictures.pictures)}", whole
        if key not in self._features:
            advance = self.bar(f"features of {pictures.name}", len(pictures.pictures))
            self._features[key] = extract(
                pictures, extractors or self.extractors, self.asked.out / "features", self.unreadable,
                self.asked.batch_size, advance,
            )  # fmt: skip
        return self._features[key]

    def labelled(self, search: PictureSet | None, role: str) -> Labelled:
        """The labelled, readable pictures; leave-one-out where there is no second set, or where it is the same folder.

        A query that lies in a second set itself is left out of its own answer (`Labelled.own`).
        """
        queries, q_rows, q_names = self._with_labels(self.data)
        if search is None or self.is_data(search):
            if len(q_names) < 2:
                raise RefusalError(
                    f"{self.asked.data} holds one labelled, readable picture, leave-one-out needs two: add pictures, or "
                    f"pass --{role} FOLDER"
                )
            classes = enumerate_classes(q_names)
            y = classes.numbers[0]
            return Labelled(queries, q_rows, y, queries, q_rows, y, np.arange(len(y)), classes.names)
        gallery, g_rows, g_names = self._with_labels(search)
        classes = enumerate_classes(q_names, g_names)
        y, gallery_y = classes.numbers
        strange = ~np.isin(y, gallery_y)
        if strange.all():
            raise RefusalError(
                f"no label of {self.asked.data} (such as {q_names[0]}) occurs in the {role} {search.folder} (such as "
                f"{g_names[0]}): both need the same class names"
            )
        if strange.any():
            self.note(
                f"{int(strange.sum())} of {len(y)} queries have a label that the {role} lacks, for example "
                f"{q_names[int(np.argmax(strange))]}: wrong in kNN and linear probe, left out of retrieval"
            )
        own = own_rows(queries, gallery)
        count = int((own >= 0).sum())
        if not count:
            return Labelled(queries, q_rows, y, gallery, g_rows, gallery_y, None, classes.names)
        if len(gallery_y) < 2:
            raise RefusalError(
                f"the {role} {search.folder} holds nothing but a query of {self.asked.data}: give other pictures"
            )
        self.note(f"{count} of {len(y)} queries are in the {role} themselves: each is left out of its own answer")
        return Labelled(queries, q_rows, y, gallery, g_rows, gallery_y, own, classes.names)

    def is_data(self, pictures: PictureSet | None) -> bool:
        """Whether a set is the folder of the queries under another name."""
        return pictures is not None and pictures.folder.resolve() == self.asked.data.resolve()

    def _with_labels(self, pictures: PictureSet) -> tuple[PictureSet, dict[str, Embeddings], list[str | None]]:
        features = self.features_of(pictures)
        names = self.labels.of(pictures)
        has = [i for i, row in enumerate(features.kept) if names[row] is not None]
        if not has:
            raise RefusalError(f"no readable picture in {pictures.folder} has a label from {self.labels.source}")
        if len(has) < len(features.kept):
            self.note(f"{len(features.kept) - len(has)} pictures of {pictures.folder} have no label and are left out")
        rows = features.kept[has]
        part = pictures.only(rows.tolist())
        return part, {name: values[has] for name, values in features.rows.items()}, [names[row] for row in rows]

    def note(self, sentence: str) -> None:
        """Say a sentence once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def names(self, baselines: tuple[str, ...] = tuple(BASELINES)) -> list[str]:
        """Encoders, the untrained network, and some of the baselines."""
        return [e.name for e in self.extractors if e.name not in BASELINES or e.name in baselines]

    def plain(self) -> tuple[PictureSet, dict[str, Embeddings]]:
        """Readable pictures without edited copies among them, and their features."""
        apart = self.gallery is not None and (self.asked.pairs or "copies" in (self.asked.tasks or ()))
        source = self.gallery if apart and self.gallery else self.data
        features = self.features_of(source)
        part = np.arange(len(features.kept))
        if self.roles is not None:
            part = np.flatnonzero(np.isin(features.kept, self.roles.gallery))
        pictures = source.only(features.kept[part].tolist())
        return pictures, {name: rows[part] for name, rows in features.rows.items()}
