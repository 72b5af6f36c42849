"""Which tasks the data offer, and each of them from features to figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np

from export.bundle import RefusalError
from export.edits import EDITS, editing_side
from training.evaluate import copies
from training.evaluate.config import Task
from training.evaluate.encoders import multi_scale
from training.evaluate.inputs import Inputs, Labelled, Numbers
from training.evaluate.label_free import LabelFree, compare, label_free_all, neighbor_agreement
from training.evaluate.linear import linear_probe
from training.evaluate.pictures import LazyPictures, PictureSet, own_rows, read_pairs
from training.evaluate.retrieval import knn_top1, retrieve
from training.evaluate.revisited import find_named, read_ground_truth, revisited
from training.knn import K

LINEAR_BASELINES = ("raw pixels", "grey, normalised pixels")
LABEL_FREE_BASELINES = ("HSV colour histogram", "perceptual hash")
_LABELLED: tuple[Task, ...] = ("knn", "linear", "retrieval")


class Evaluation(Inputs):
    """The tasks, on their inputs."""

    # --- what there is to do ------------------------------------------------------------------------------------

    def choose(self) -> list[Task]:
        """The tasks asked for, or those that the data offer. Raises `RefusalError` for one that lacks its data."""
        offered: dict[Task, str | None] = dict.fromkeys(get_args(Task))
        labels = [label for label in self.labels.of(self.data) if label is not None]
        # Folders that say what a copy was made by are no classes.
        if self.asked.tasks is None and self.asked.labels is None:
            labels = [] if self.roles or self.asked.pairs or self.asked.ground_truth else labels
        alone = all(s is None or self.is_data(s) for s in (self.bank, self.gallery))
        trained_on = self.bank or self.gallery
        if not labels:
            for task in _LABELLED:
                offered[task] = (
                    f"{self.asked.data} has no labels: sort its pictures into a folder per class, or pass --labels FILE"
                )
        elif alone and len(set(labels)) == len(labels):
            for task in _LABELLED:
                offered[task] = f"every picture in {self.asked.data} has a label of its own: pass --gallery FOLDER"
        elif trained_on is None or self.is_data(trained_on):
            offered["linear"] = (
                f"the linear probe needs training pictures that are not {self.asked.data}: pass --bank FOLDER with the "
                "same labels"
            )
        if self.roles is None and (self.asked.pairs is None or self.gallery is None):
            by_name = self.gallery is not None and "copies" in (self.asked.tasks or ())
            if not by_name:
                offered["copies"] = (
                    f"{self.asked.data} has no copy-detection layout: expected folders gallery/ and queries/ or "
                    "q:TRANSFORM/, or --gallery FOLDER with --pairs FILE"
                )
        if self.asked.ground_truth is None:
            offered["revisited"] = "the revisited protocol needs its ground truth: pass --ground-truth FILE (JSON)"
        chosen = [task for task, lack in offered.items() if lack is None]
        if self.asked.tasks is not None:
            for task in self.asked.tasks:
                if (lack := offered[task]) is not None:
                    raise RefusalError(f"--tasks {task}: {lack}")
            chosen = list(dict.fromkeys(self.asked.tasks))
        searched = {"knn": self.bank or self.gallery, "linear": self.bank or self.gallery,
                    "retrieval": self.gallery or self.bank}  # fmt: skip
        for task in chosen:  # a list of labels that does not fit is refused before hours of features
            if (pictures := searched.get(task)) is not None:
                self.labels.of(pictures)
        return chosen

    def measure(self, task: Task) -> dict[str, Any]:
        """One task's protocol and figures, as results.json stores them."""
        measures: dict[Task, Callable[[], dict[str, Any]]] = {
            "knn": self._knn, "linear": self._linear, "retrieval": self._retrieval, "copies": self._copies,
            "label-free": self._label_free, "revisited": self._revisited,
        }  # fmt: skip
        return measures[task]()

    # --- tasks --------------------------------------------------------------------------------------------------

    def _knn(self) -> dict[str, Any]:
        it = self.ranked = self.labelled(self.bank or self.gallery, "bank")
        self._singletons(it)
        results = {
            name: {
                "top1": knn_top1(it.query_rows[name], it.query_labels, it.gallery_rows[name], it.gallery_labels, it.own)
            }
            for name in self.names()
        }
        return {
            "protocol": f"[CLS], unit length, weighted vote exp(cos / 0.07) of k = {K}, {it.searched}, labels from "
            f"{self.labels.source}",
            "leave_one_out": it.leave_one_out, "k": K, "queries": len(it.query_labels),
            "bank": len(it.gallery_labels), "classes": len(it.classes), "results": results,
        }  # fmt: skip

    def _singletons(self, it: Labelled) -> None:
        if it.leave_one_out:
            alone = int((np.bincount(it.query_labels)[it.query_labels] == 1).sum())
            if alone:
                self.note(f"{alone} pictures are alone in their class: leave-one-out kNN cannot get them right")

    def _linear(self) -> dict[str, Any]:
        it = self.labelled(self.bank or self.gallery, "bank")
        names = self.names(LINEAR_BASELINES)
        bank = np.arange(len(it.gallery_labels))
        if it.own is not None:
            bank = np.setdiff1d(bank, it.own)
            self.note(
                f"{len(it.gallery_labels) - len(bank)} pictures of the bank are queries: the linear probe does without"
            )
            if not len(bank):
                raise RefusalError(
                    f"every picture in {it.gallery.folder} is a query, too: give the linear probe others with --bank"
                )
        advance = self.bar("linear probe", len(names))
        results = {}
        for name in names:
            probe = linear_probe(
                it.gallery_rows[name][bank],
                it.gallery_labels[bank],
                it.query_rows[name],
                it.query_labels,
                self.asked.seed,
            )
            results[name] = {"top1": probe.top1, "learning_rate": probe.learning_rate,
                             "held_out_top1": {str(k): v for k, v in probe.held_out_top1.items()}}  # fmt: skip
            advance(1)
        return {
            "protocol": f"logistic regression on standardised [CLS] features, SGD, {probe.epochs} epochs; the learning rate "
            "is chosen on a fifth of the bank, never on the queries",
            "queries": len(it.query_labels), "bank": len(bank), "classes": len(it.classes),
            "results": results,
        }  # fmt: skip

    def _retrieval(self) -> dict[str, Any]:
        it = self.ranked = self.labelled(self.gallery or self.bank, "gallery")
        results, counted = {}, 0
        for name in self.names():
            try:
                found = retrieve(it.query_rows[name], it.query_labels, it.gallery_rows[name], it.gallery_labels, it.own)
            except ValueError:
                raise RefusalError(
                    f"no picture in {self.asked.data} has another one of its label to find: pass --gallery FOLDER, or "
                    "leave out the retrieval task with --tasks"
                ) from None
            counted = len(found.counted)
            recall = {f"recall_at_{k}": value for k, value in found.recall_at.items()}
            results[name] = {**recall, "map": found.mean_average_precision}
        left_out = len(it.query_labels) - counted
        if left_out:
            self.note(f"{left_out} queries have no relevant picture in the gallery and are left out of retrieval")
        return {
            "protocol": f"cosine ranking of the whole gallery, relevant = same label, ties by gallery order, "
            f"{it.searched}",
            "leave_one_out": it.leave_one_out, "queries": counted, "queries_without_relevant": left_out,
            "gallery": len(it.gallery_labels), "classes": len(it.classes), "results": results,
        }  # fmt: skip

    def _copies(self) -> dict[str, Any]:
        if self.roles is not None:
            everything, task = self.data, self.roles
        else:
            assert self.gallery is not None
            pictures = self.data.pictures, self.gallery.pictures
            own = own_rows(self.data, self.gallery)
            if (own >= 0).any():
                raise RefusalError(
                    f"{int((own >= 0).sum())} queries, for example {pictures[0][int(np.argmax(own >= 0))].key}, are in the "
                    f"gallery {self.gallery.folder} themselves and would find themselves: give one without them"
                )
            pairs = self.asked.pairs
            task = copies.by_stem(*pictures) if pairs is None else copies.from_pairs(*pictures, read_pairs(pairs))
            everything = PictureSet("queries and gallery", self.data.folder, [*pictures[0], *pictures[1]])
        if task.lost:
            self.note(
                f"{task.lost} of {len(task.queries)} queries have no gallery picture of their name: they count as "
                "negatives (--pairs FILE says which picture is whose original)"
            )
        features = self.features_of(everything)
        task, q, g = self._readable(task, features.kept)
        results, found = {}, None
        for name in self.names():
            found = copies.detect(features.rows[name][q], features.rows[name][g], task)
            self.curves[name] = found.curve
            results[name] = {
                "micro_ap": found.micro_ap, "micro_ap_best": found.micro_ap_best,
                "recall_at_precision_90": found.recall_at_precision_90, "recall_at_1": found.recall_at_1,
                "map": found.mean_average_precision, "recall_at_1_by_transform": found.by_transform,
            }  # fmt: skip
        assert found is not None
        with_original = sum(bool(o) for o in task.originals)
        return {
            "protocol": f"micro-AP over all queries and their {found.candidates} candidates; micro_ap_best and recall at "
            "precision 0.9 over each query's best candidate; recall counts against the queries with an original",
            "queries": with_original, "negatives": len(task.queries) - with_original, "gallery": len(task.gallery),
            "results": results,
        }  # fmt: skip

    def _readable(self, task: copies.CopyTask, kept: Numbers) -> tuple[copies.CopyTask, list[int], list[int]]:
        """The task without the pictures that could not be read, and the feature rows of queries and gallery."""
        place = {int(row): i for i, row in enumerate(kept)}
        gallery = [i for i, row in enumerate(task.gallery) if row in place]
        moved = {old: new for new, old in enumerate(gallery)}
        queries = [i for i, row in enumerate(task.queries) if row in place]
        # A query whose original cannot be read is no negative: it is left out.
        whole = [i for i in queries if all(o in moved for o in task.originals[i])]
        if len(whole) < len(queries):
            self.note(f"{len(queries) - len(whole)} queries are left out: their original cannot be read")
        if not any(task.originals[i] for i in whole):
            raise RefusalError(
                f"no query in {self.asked.data} has a readable original in the gallery: check the file names, or pass "
                "--pairs FILE"
            )
        smaller = copies.CopyTask(
            [task.queries[i] for i in whole], [task.gallery[i] for i in gallery],
            [[moved[o] for o in task.originals[i]] for i in whole], [task.transforms[i] for i in whole],
        )  # fmt: skip
        return smaller, [place[row] for row in smaller.queries], [place[row] for row in smaller.gallery]

    def _label_free(self) -> dict[str, Any]:
        pictures, galleries = self.plain()
        names = self.names(LABEL_FREE_BASELINES)
        # An edit that training made, too, would measure what was trained for (as training/verdict.py has it).
        trained_by_gamma = any(e.about.get("views") == "greyscale" for e in self.encoders)
        edits = {name: edit for name, edit in EDITS.items() if not (trained_by_gamma and name == "gamma")}
        if trained_by_gamma:
            self.note("label-free: without the gamma edit, which the `greyscale` views of the training make, too")
        side = editing_side(*(e.spec.size for e in self.extractors if e.name in names))
        scores: dict[str, LabelFree] = {}
        for spec in dict.fromkeys(e.spec for e in self.extractors):
            mine = {e.name: e for e in self.extractors if e.spec == spec and e.name in names}
            if mine:
                advance = self.bar("edited pictures", min(self.asked.label_free_queries, len(pictures.pictures)))
                scores |= label_free_all(
                    {name: e.embed for name, e in mine.items()}, LazyPictures(pictures.pictures), spec, self.asked.seed,
                    self.asked.label_free_queries, edits, {name: galleries[name] for name in mine}, advance, side,
                )  # fmt: skip
        results = {
            name: {
                "recall_at_1": scores[name].recall_at_1.mean, "recall_at_1_error": scores[name].recall_at_1.standard_error,
                "mrr": scores[name].mean_reciprocal_rank.mean,
                "mrr_error": scores[name].mean_reciprocal_rank.standard_error,
                "recall_at_1_by_edit": {edit: hit for edit, (hit, _) in scores[name].by_edit.items()},
            }
            for name in names
        }  # fmt: skip
        first = scores[self.encoders[0].extractor.name]
        stored: dict[str, Any] = {
            "protocol": f"{len(first.pictures)} pictures of {side} px, each with {len(edits)} edits that training does not "
            "make, search all pictures for their original; a tie counts as not found; standard errors by bootstrap over "
            "pictures",
            "edits": list(edits), "side": side,
            "queries": first.ranks.size, "gallery": first.gallery, "queries_sha256": first.queries_sha256,
            "results": results,
        }  # fmt: skip
        if first.unreadable:
            self.note(f"label-free: {first.unreadable} pictures could not be read any more and were not edited")
        if len(self.encoders) == 2:
            names = [e.extractor.name for e in self.encoders]
            if scores[names[0]].queries_sha256 != scores[names[1]].queries_sha256:
                raise RefusalError(f"pictures of {self.asked.data} changed during the evaluation: run it again")
            difference = compare(scores[names[1]], scores[names[0]])
            stored["difference"] = {
                "of": f"{names[0]} minus {names[1]}",
                "recall_at_1": difference.recall_at_1._asdict(),
                "mrr": difference.mean_reciprocal_rank._asdict(),
                "verdict": difference.verdict,
            }
            low, high = difference.mean_reciprocal_rank.low, difference.mean_reciprocal_rank.high
            self.note(
                f"label-free: {names[0]} against {names[1]}: {difference.verdict} (mean reciprocal rank "
                f"{difference.mean_reciprocal_rank.mean:+.4f}, 95 % interval {low:+.4f} to {high:+.4f})"
            )
        return stored

    def _revisited(self) -> dict[str, Any]:
        assert self.asked.ground_truth is not None
        truth = read_ground_truth(self.asked.ground_truth)
        source = self.gallery or self.data
        gallery = PictureSet("imlist", source.folder, find_named(truth.imlist, source.pictures, source.folder))
        queries = PictureSet(
            "qimlist", self.data.folder, find_named(truth.qimlist, self.data.pictures, self.data.folder)
        )
        extractors = [*(multi_scale(e) for e in self.encoders), *self.baselines]
        results: dict[str, Any] = {}
        sets = [self.features_of(pictures, extractors, whole=True) for pictures in (queries, gallery)]
        for pictures, features in zip((queries, gallery), sets, strict=True):
            if len(features.kept) < len(pictures.pictures):
                raise RefusalError(
                    f"{len(pictures.pictures) - len(features.kept)} pictures that the ground truth names cannot be read, "
                    f"for example {self.unreadable[-1][0]}: its positions would no longer fit, so replace the files"
                )
        for e in extractors:
            found = revisited(sets[0].rows[e.name], sets[1].rows[e.name], truth)
            results[e.name] = {
                f"{protocol}_{key}": value
                for protocol, r in found.items()
                for key, value in (
                    ("map", r.mean_average_precision), ("queries", r.counted),
                    *((f"mp_at_{k}", p) for k, p in r.mean_precision_at.items()),
                )
            }  # fmt: skip
        scales = "1, 1/√2, 1/2" if self.encoders[0].network is not None else "1 (a bundle has one input size)"
        return {
            "protocol": f"revisited easy, medium, hard; trapezoid AP, junk removed; whole pictures, longer side "
            f"{self.encoders[0].extractor.spec.size} px, scales {scales}; queries not cropped; "
            "baselines see the square input",
            "queries": len(truth.qimlist), "gallery": len(truth.imlist), "results": results,
        }  # fmt: skip

    def agreement(self) -> dict[str, Any]:
        """Shared neighbours of the two encoders, and of each with every baseline."""
        _, rows = self.plain()
        first, second = (e.extractor.name for e in self.encoders)
        k = min(10, len(rows[first]) - 1)
        if k < 1:
            raise RefusalError(f"{self.asked.data} holds one readable picture: neighbours need two")
        results = {
            f"{first} and {name}": {"agreement": neighbor_agreement(rows[first], rows[name], k)}
            for name in [second, *(n for n in self.names() if n not in (first, second))]
        }
        return {
            "protocol": f"share of each picture's {k} nearest others that both have, by chance "
            f"{k / (len(rows[first]) - 1):.4f}",
            "pictures": len(rows[first]), "results": results,
        }  # fmt: skip
