"""A store of keys that grows, forgets and is searched exactly: what GRACE, RECIPE and SERAC keep their edits in.

Keys lie in chunks of doubling capacity, so appending never moves a key. Beside them the store keeps codes, of a byte
an element or of a few projected dimensions, from which a search bounds every value; the keys themselves are read
only for the few that could win. The answers are those of :func:`nearest_key` and :func:`max_inner_product`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import backend, check
from .retrieval import (
    _KEY_DTYPES,
    _QUERY_DTYPES,
    MAX_K,
    beating,
    covering,
    exact_values,
    max_inner_product,
    merge,
    nearest_key,
    nothing_found,
    search_torch,
)

_FIRST_CAPACITY = 1024
_MAX_CODED = 65536  # dimensions of which sums of byte products stay within 32 bits
_FIT_AT = 4096  # keys from which on the automatic choice looks at their spectrum
_WIDTHS = (32, 64, 128, 256)


class _Chunk:
    """Rows ``offset`` to ``offset + n`` of the store, with room for ``capacity``."""

    def __init__(
        self, offset: int, capacity: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.offset, self.n = offset, 0
        self.keys = torch.empty(capacity, dim, dtype=dtype, device=device)
        self.scale = (
            torch.empty(capacity, dtype=torch.float32, device=device) if dtype == torch.int8 else None
        )
        self.codes: tuple[Tensor, ...] = ()  # bytes, step, error, norm, rest

    @property
    def capacity(self) -> int:
        return self.keys.shape[0]

    def rows(self, part: slice | Tensor) -> Tensor:
        """Keys in float32; of int8 ones the product with their scale, rounded."""
        keys = self.keys[part].float()
        return keys if self.scale is None else keys * self.scale[part, None]


class _Projection:
    """Orthonormal rows, (m, d) in float64, on which keys and queries are projected before they are coded."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projected rows of x in float32, norms of the whole and of what is left, both rounded up."""
        x = x.double()
        inside = x @ self.rows.T
        norm = x.square().sum(1)
        rest = (norm - inside.square().sum(1)).clamp(min=0) + 1e-9 * norm
        return inside.float(), norm.sqrt().float() * (1 + 1e-6), rest.sqrt().float() * (1 + 1e-6)


class KeyIndex:
    """Keys with a radius each, searched exactly; ids count the keys in the order they were added.

    Args:
        dim: d, the keys' dimension.
        dtype: what keys are kept in: float32, bfloat16, float16, or int8 with a scale for each key (the largest
            magnitude over 127). Searches are exact over the keys as they are kept.
        scan: what a search on a CPU reads. ``"int8"``: codes of a byte an element, d bytes a key beside the
            key. ``"projected"``: codes of a projection on the leading eigenvectors of the keys' second moment, 32 to
            256 bytes a key, which discards most keys if the spectrum decays. ``"keys"``: the keys, no codes.
            ``"auto"``: int8 codes, replaced by projected ones at 4,096 keys (and at every :meth:`fit`)
            if fewer bytes would be read for a sample of the keys as queries. No choice changes a result.
        device: where the keys are. Codes are for CPUs; elsewhere keys are scanned.

    Raises:
        ValueError: a dimension below 1, an unknown scan.
        TypeError: a dtype not listed.

    >>> index = KeyIndex(3)
    >>> index.add(torch.eye(3), radius=torch.full((3,), 0.5))
    tensor([0, 1, 2])
    >>> index.nearest(torch.tensor([[0.0, 1.0, 0.1], [1.0, 1.0, 1.0]]))[0]
    tensor([ 1, -1])
    """

    def __init__(
        self,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        scan: str = "auto",
        device: torch.device | str = "cpu",
    ) -> None:
        name = type(self).__name__
        if dim < 1:
            raise ValueError(f"{name}: dim must be at least 1, got {dim}")
        if dtype not in _KEY_DTYPES:
            wanted = check.one_of([check.name_of(d) for d in _KEY_DTYPES])
            raise TypeError(f"{name}: dtype must be {wanted}, got {check.name_of(dtype)}")
        check.choice(name, ("auto", "int8", "projected", "keys"), scan=scan)
        self.dim, self.dtype, self.scan, self.device = dim, dtype, scan, torch.device(device)
        self._chunks: list[_Chunk] = []
        self._projection: _Projection | None = None
        self._alive = torch.empty(0, dtype=torch.bool, device=self.device)
        self._radius = torch.empty(0, dtype=torch.float32, device=self.device)
        self._n_removed = 0

    # ---- contents ----

    @property
    def n_added(self) -> int:
        """How many keys were added in all: the next id."""
        return self._chunks[-1].offset + self._chunks[-1].n if self._chunks else 0

    def __len__(self) -> int:
        return self.n_added - self._n_removed

    @property
    def n_bytes(self) -> int:
        """Bytes held, room to grow included."""
        held = [self._radius, self._alive]
        for chunk in self._chunks:
            held += [chunk.keys, *chunk.codes, *([] if chunk.scale is None else [chunk.scale])]
        return sum(t.nbytes for t in held)

    @property
    def scanned(self) -> str:
        """What a search reads now: ``"keys"``, ``"int8"`` or ``"projected"``."""
        if not self._coded():
            return "keys"
        return "int8" if self._projection is None else "projected"

    def keys(self, ids: Tensor | None = None) -> Tensor:
        """The keys of these ids as they are kept (int8 ones times their scale, in float32); None: all ever added."""
        if ids is None:
            ids = torch.arange(self.n_added)
        ids = self._known(ids, alive=False)
        kept = torch.float32 if self.dtype == torch.int8 else self.dtype
        out = torch.empty(len(ids), self.dim, dtype=kept, device=self.device)
        for chunk, places, rows in self._split(ids):
            out[places] = chunk.rows(rows).to(kept)
        return out

    def radii(self, ids: Tensor) -> Tensor:
        """The radii of these ids."""
        return self._radius[self._known(ids, alive=False)]

    def add(self, keys: Tensor, radius: Tensor | float = math.inf) -> Tensor:
        """Append keys.

        Args:
            keys: (n, d), float32, bfloat16 or float16; rounded to the store's dtype.
            radius: (n,) float32, or one number for all.

        Returns:
            Their ids, (n,), int64.
        """
        keys = self._rows("add", keys)
        radii = self._radii("add", radius, len(keys))
        start, done = self.n_added, 0
        self._grow(start + len(keys))
        self._radius[start : start + len(keys)] = radii
        while done < len(keys):
            chunk = self._room(len(keys) - done)
            now = min(len(keys) - done, chunk.capacity - chunk.n)
            part = slice(chunk.n, chunk.n + now)
            chunk.n += now
            self._store(chunk, part, keys[done : done + now])
            done += now
        if start < self._fits_at() <= self.n_added:
            self.fit()
        return torch.arange(start, self.n_added, device=self.device)

    def remove(self, ids: Tensor) -> None:
        """Forget keys; their ids are not used again.

        Raises:
            ValueError: an id that was never given out, or is removed already.
        """
        ids = self._known(ids).unique()
        self._alive[ids] = False
        self._n_removed += len(ids)

    def restore(self, ids: Tensor) -> None:
        """Take removed keys back, under their ids.

        Raises:
            ValueError: an id that was never given out, or is not removed.
        """
        ids = self._known(ids, alive=False).unique()
        if bool(self._alive[ids].any()):
            raise ValueError(f"id {int(ids[self._alive[ids]][0])} was not removed")
        self._alive[ids] = True
        self._n_removed -= len(ids)

    def update(self, ids: Tensor, keys: Tensor | None = None, radius: Tensor | float | None = None) -> None:
        """Replace keys, radii or both of these ids.

        Raises:
            ValueError: an id that is not in the store, or is given twice.
        """
        ids = self._known(ids)
        if len(ids.unique()) != len(ids):
            raise ValueError("update: an id is given twice")
        if keys is not None:
            keys = self._rows("update", keys)
            if len(keys) != len(ids):
                raise ValueError(f"update: {len(ids)} keys expected, one for each id, got {len(keys)}")
        if radius is not None:
            self._radius[ids] = self._radii("update", radius, len(ids))
        if keys is not None:
            for chunk, places, rows in self._split(ids):
                self._store(chunk, rows, keys[places])

    # ---- searching ----

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest key of every query, if it covers it: as :func:`fastedit.ops.nearest_key`.

        Returns:
            id (B,), int64, −1 for none; distance (B,), float32.
        """
        values, ids = self._search("nearest", queries, 1, nearest=True, highest=False)
        return covering(values, ids, self._radius)

    def neighbours(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest keys of every query whatever their radii, nearest first; the lowest id of equal ones.

        Returns:
            ids (B, k), int64, −1 where there are fewer; distances (B, k), float32, infinite there.
        """
        values, ids = self._search("neighbours", queries, k, nearest=True, highest=False)
        distances = (-values).sqrt().float()
        return torch.where(distances < math.inf, ids, -1), distances

    def max_inner_product(
        self, queries: Tensor, threshold: Tensor | None = None, k: int = 1, *, ties: str = "lowest"
    ) -> tuple[Tensor, Tensor]:
        """The k keys of greatest inner product: as :func:`fastedit.ops.max_inner_product`.

        Returns:
            ids (B, k), int64, −1 for none; scores (B, k), float32, −infinity there.
        """
        op = "max_inner_product"
        check.choice(op, ("lowest", "highest"), ties=ties)
        check.is_tensor(op, queries=queries)
        check.shape(op, queries.shape[:1], "like the rows of queries", threshold=threshold)
        check.dtype(op, (torch.float32,), threshold=threshold)
        found = self._search(op, queries, k, nearest=False, highest=ties == "highest")
        return beating(*found, threshold)

    # ---- snapshots ----

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to make the store again, as tensors and plain values; codes are made anew."""
        n = self.n_added
        state: dict[str, Any] = {"dim": self.dim, "dtype": check.name_of(self.dtype), "n_added": n}
        state |= {"alive": self._alive[:n].clone(), "radius": self._radius[:n].clone()}
        state["keys"] = torch.cat([self._empty_keys(), *(chunk.keys[: chunk.n] for chunk in self._chunks)])
        if self.dtype == torch.int8:
            scales = [chunk.scale[: chunk.n] for chunk in self._chunks if chunk.scale is not None]
            state["scale"] = torch.cat([self._radius[:0], *scales])
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the store that ``state`` was taken of; what was here is dropped.

        Raises:
            ValueError: another dimension or dtype.
        """
        for name, mine in (("dim", self.dim), ("dtype", check.name_of(self.dtype))):
            if state[name] != mine:
                raise ValueError(f"load_state_dict: {name} must be {mine}, got {state[name]}")
        self._clear()
        n = state["n_added"]
        self._grow(n)
        self._alive[:n] = state["alive"]
        self._radius[:n] = state["radius"]
        self._n_removed = n - int(state["alive"].sum())
        done = 0
        while done < n:
            chunk = self._room(n - done)
            chunk.n = min(n - done, chunk.capacity)
            chunk.keys[: chunk.n] = state["keys"][done : done + chunk.n]
            if chunk.scale is not None:
                chunk.scale[: chunk.n] = state["scale"][done : done + chunk.n]
            self._code(chunk, slice(0, chunk.n))
            done += chunk.n
        if n >= self._fits_at():
            self.fit()

    # ---- projections ----

    def fit(self) -> None:
        """With ``scan="auto"`` or ``"projected"``: choose anew what searches read, from a sample of the keys."""
        if self.scan not in ("auto", "projected") or not self._may_code() or not len(self):
            return
        sample = self._sample(2 * _FIT_AT)
        before = self._projection
        self._projection = _leading(sample, must=self.scan == "projected")
        if self._projection is not None or before is not None:
            self._code_all()

    def _sample(self, n: int) -> Tensor:
        ids = self._alive[: self.n_added].nonzero()[:, 0]
        return self.keys(ids[:: max(1, len(ids) // n)]).float()

    # ---- storing ----

    def _clear(self) -> None:
        self._chunks, self._projection, self._n_removed = [], None, 0
        self._alive, self._radius = self._alive[:0], self._radius[:0]

    def _grow(self, n: int) -> None:
        """Room for n flags and radii; these few bytes a key are copied, keys are not."""
        room = n - len(self._alive)
        if room > 0:
            room = max(room, len(self._alive), _FIRST_CAPACITY)
            self._alive = torch.cat((self._alive, self._alive.new_ones(room)))
            self._radius = torch.cat((self._radius, self._radius.new_empty(room)))

    def _empty_keys(self) -> Tensor:
        return torch.empty(0, self.dim, dtype=self.dtype, device=self.device)

    def _fits_at(self) -> float:
        """The number of keys at which the projection is chosen."""
        return {"auto": _FIT_AT, "projected": 1}.get(self.scan, math.inf)

    def _may_code(self) -> bool:
        return self.device.type == "cpu" and hasattr(backend.extension(), "encode_keys")

    def _coded(self) -> bool:
        """Whether searches read codes. Plain int8 keys are as short as theirs."""
        if self.scan == "keys" or not self._may_code():
            return False
        if self._projection is not None:
            return True
        return self.dim <= _MAX_CODED and not (self.scan == "auto" and self.dtype == torch.int8)

    def _rows(self, op: str, keys: Tensor) -> Tensor:
        check.is_tensor(op, keys=keys)
        check.matrix(op, keys=keys)
        check.last_dim(op, self.dim, "the store", keys=keys)
        check.dtype(op, _QUERY_DTYPES, keys=keys)
        if keys.device != self.device and self.device.index is not None:
            raise ValueError(f"{op}: keys must be on {self.device}, got {keys.device}")
        return keys.detach()

    def _radii(self, op: str, radius: Tensor | float, n: int) -> Tensor:
        if not isinstance(radius, Tensor):
            return torch.full((n,), float(radius), dtype=torch.float32, device=self.device)
        check.shape(op, (n,), "like the keys", radius=radius)
        check.dtype(op, (torch.float32,), radius=radius)
        return radius.detach().to(self.device)

    def _room(self, needed: int) -> _Chunk:
        """The last chunk if it has room, otherwise a new one: as large as all so far, or as what is ``needed``."""
        if not self._chunks or self._chunks[-1].n == self._chunks[-1].capacity:
            n = self.n_added
            chunk = _Chunk(n, max(n, needed, _FIRST_CAPACITY), self.dim, self.dtype, self.device)
            self._chunks.append(chunk)
        return self._chunks[-1]

    def _store(self, chunk: _Chunk, part: slice | Tensor, keys: Tensor) -> None:
        if chunk.scale is None:
            chunk.keys[part] = keys.to(self.device, self.dtype)
        else:
            keys = keys.to(self.device).float()
            scale = keys.abs().amax(1) / 127
            chunk.scale[part] = scale
            chunk.keys[part] = (
                (keys / torch.where(scale > 0, scale, 1)[:, None]).round().clamp(-127, 127).to(torch.int8)
            )
        self._code(chunk, part)

    def _code_all(self) -> None:
        for chunk in self._chunks:
            chunk.codes = ()
            self._code(chunk, slice(0, chunk.n))

    def _code(self, chunk: _Chunk, part: slice | Tensor) -> None:
        """Codes of these rows, which are one run of rows or single ones."""
        if not self._coded():
            chunk.codes = ()
            return
        if not chunk.codes:
            chunk.codes = self._empty_codes(chunk.capacity)
            part = slice(0, chunk.n)
        if isinstance(part, Tensor):
            for row in part.tolist():
                self._code(chunk, slice(row, row + 1))
            return
        data, step, error, norm, rest = chunk.codes
        module = backend.compiled()
        size = max(1, (1 << 24) // self.dim)
        for start in range(part.start, part.stop, size):
            run = slice(start, min(start + size, part.stop))
            rows = chunk.rows(run)
            given = (data, step[: run.stop], error[: run.stop], norm[: run.stop], None)
            if self._projection is None:
                module.encode_keys(rows, given, start)
            else:
                rows, whole, rest[run] = self._projection.split(rows)
                module.encode_keys(rows, given, start)
                norm[run] = whole

    def _empty_codes(self, capacity: int) -> tuple[Tensor, ...]:
        m = self.dim if self._projection is None else len(self._projection.rows)
        data = torch.empty((capacity + 15) // 16, 64 * ((m + 3) // 4), dtype=torch.uint8)
        return (
            data,
            *(
                torch.empty(capacity, dtype=torch.float32)
                for _ in range(3 if self._projection is None else 4)
            ),
            *self._no_rest(),
        )

    def _no_rest(self) -> tuple[Tensor, ...]:
        return (torch.empty(0, dtype=torch.float32),) if self._projection is None else ()

    # ---- looking up ----

    def _known(self, ids: Tensor, alive: bool = True) -> Tensor:
        check.is_tensor(type(self).__name__, ids=ids)
        ids = ids.to(self.device, torch.int64).reshape(-1)
        if len(ids):
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.n_added:
                raise ValueError(f"ids must be from 0 to {self.n_added - 1}, got {low} to {high}")
            if alive and not bool(self._alive[ids].all()):
                raise ValueError(f"id {int(ids[~self._alive[ids]][0])} was removed")
        return ids

    def _split(self, ids: Tensor) -> Iterator[tuple[_Chunk, Tensor, Tensor]]:
        """For every chunk with any of these ids: the chunk, their places in ``ids``, their rows in the chunk."""
        for chunk in self._chunks:
            places = ((ids >= chunk.offset) & (ids < chunk.offset + chunk.n)).nonzero()[:, 0]
            if len(places):
                yield chunk, places, ids[places] - chunk.offset

    def _search(
        self, op: str, queries: Tensor, k: int, nearest: bool, highest: bool
    ) -> tuple[Tensor, Tensor]:
        """The best k values (scores, or minus squared distances) and ids: (B, k), float64 and int64."""
        check.is_tensor(op, queries=queries)
        check.matrix(op, queries=queries)
        check.last_dim(op, self.dim, "the store", queries=queries)
        check.dtype(op, _QUERY_DTYPES, queries=queries)
        if not 1 <= k <= MAX_K:
            raise ValueError(f"{op}: k must be from 1 to {MAX_K}, got {k}")
        return self._search_checked(queries.detach().float().contiguous(), k, nearest, highest)

    def _search_checked(self, queries: Tensor, k: int, nearest: bool, highest: bool) -> tuple[Tensor, Tensor]:
        found = nothing_found(queries, k)
        chosen = backend.requested()
        if self._may_code() and chosen in (None, "cpp"):
            self._search_compiled(queries, found, nearest, highest)
            return found
        for chunk in self._chunks:
            keys, alive = chunk.keys[: chunk.n], self._alive_of(chunk)
            scale = None if chunk.scale is None else chunk.scale[: chunk.n]
            if chosen == "torch" or (chosen is None and self.device.type == "cpu") or (nearest and k > 1):
                found = search_torch(queries, keys, k, alive, scale, nearest, highest, chunk.offset, found)
                continue
            if nearest:
                ids = nearest_key(queries, keys, None, alive, scale=scale)[0][:, None]
            else:
                ties = "highest" if highest else "lowest"
                ids = max_inner_product(queries, keys, None, k, alive, scale=scale, ties=ties)[0]
            found = _joined(found, queries, keys, scale, ids, chunk.offset, nearest, highest)
        return found

    def _alive_of(self, chunk: _Chunk) -> Tensor | None:
        return self._alive[chunk.offset : chunk.offset + chunk.n] if self._n_removed else None

    def _search_compiled(
        self, queries: Tensor, found: tuple[Tensor, Tensor], nearest: bool, highest: bool
    ) -> None:
        module = backend.compiled()
        projected: dict[str, Tensor] = {}
        if self._projection is not None:
            scanned, _, rest = self._projection.split(queries)
            projected = {"scan_queries": scanned.contiguous(), "rest": rest}
        for chunk in self._chunks:
            n = chunk.n
            codes = None
            if chunk.codes:
                data, step, error, norm, rest = chunk.codes
                codes = (data, step[:n], error[:n], norm[:n], rest[:n] if projected else None)
            module.search_keys(
                queries,
                chunk.keys[:n],
                *found,
                nearest=nearest,
                highest=highest,
                offset=chunk.offset,
                alive=self._alive_of(chunk),
                scale=None if chunk.scale is None else chunk.scale[:n],
                codes=codes,
                **projected,
            )


def _joined(
    found: tuple[Tensor, Tensor],
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | None,
    rows: Tensor,
    offset: int,
    nearest: bool,
    highest: bool,
) -> tuple[Tensor, Tensor]:
    """The best k of what was found before and of a later chunk's ``rows``, (B, k), −1 for none; waits for nothing."""
    n, k = rows.shape
    rows = rows.sort(dim=1, descending=highest).values
    b = torch.arange(n, device=rows.device).repeat_interleave(k)
    values = exact_values(queries, keys, scale, b, rows.clamp(min=0).reshape(-1), nearest).view(n, k)
    new = torch.where(rows >= 0, values, -math.inf), torch.where(rows >= 0, rows + offset, -1)
    parts = (new, found) if highest else (found, new)
    values, ids = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids.gather(1, order)[:, :k]


def _leading(sample: Tensor, must: bool) -> _Projection | None:
    """The projection for which fewest bytes are read, or None if plain codes need fewer (unless it ``must`` be one).

    A key whose bound does not reach the best inner product costs its codes; the others cost their row, in float32 and
    from anywhere in memory, counted twice. Measured for keys of the sample as queries on the rest of it.
    """
    n, d = sample.shape
    widest = min(_WIDTHS[-1], d, n)
    generator = torch.Generator().manual_seed(0)
    x = sample if bool(sample.isfinite().all()) else sample[sample.isfinite().all(1)]
    basis = torch.randn(d, widest, generator=generator)
    for _ in range(3):  # of the second moment: the eigenvalues' decay to the sixth power
        basis = torch.linalg.qr(x.T @ (x @ basis))[0]
    small = x @ basis
    order = torch.linalg.eigh(small.T.double() @ small.double())[1].flip(1)
    rows = torch.linalg.qr(basis.double() @ order)[0].T.contiguous()  # the leading ones first
    queries = x[:: max(1, len(x) // 16)][:16].double()
    keys = x.double()
    exact = queries @ keys.T
    best = exact.topk(2, dim=1).values[:, 1:]  # the first is the query itself
    costs: dict[int, float] = {}
    for m in sorted({min(m, widest) for m in _WIDTHS}):
        part = _Projection(rows[:m])
        inside, _, rest = part.split(keys)
        inside_q, _, rest_q = part.split(queries)
        bound = inside_q.double() @ inside.double().T + rest_q[:, None].double() * rest.double()
        costs[m] = m + 8 * d * float((bound >= best).double().mean())
    m = min(costs, key=lambda m: costs[m])
    if not must and costs[m] > 0.7 * d:
        return None
    return _Projection(rows[:m].clone())


class FaissIndex(KeyIndex):
    """A :class:`KeyIndex` whose candidates come from FAISS and are compared exactly: for the largest stores.

    With an index that is exact (``"Flat"``) the answers are those of KeyIndex as long as the winners are among the
    candidates of FAISS's float32 arithmetic. With an approximate one a key may be missed, but no score, distance or
    threshold is ever wrong. The keys stay here as well, for that comparison.

    Args:
        dim: d, the keys' dimension.
        factory: what ``faiss.index_factory`` is given, for example ``"Flat"``, ``"HNSW32"``, ``"IVF256,Flat"``.
        candidates: how many keys FAISS names for each query, at least k.
        dtype: what keys are kept in, as in KeyIndex.

    Raises:
        ImportError: FAISS is not installed (``pip install "fastedit-llm[faiss]"``).
    """

    def __init__(
        self, dim: int, factory: str = "Flat", *, candidates: int = 32, dtype: torch.dtype = torch.float32
    ) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ImportError('FaissIndex needs FAISS: pip install "fastedit-llm[faiss]"') from error
        super().__init__(dim, dtype=dtype, scan="keys")
        self._library = faiss
        self.factory, self.candidates = factory, candidates
        self._indices: dict[bool, Any] = {}  # by whether it is for nearest keys

    def update(self, ids: Tensor, keys: Tensor | None = None, radius: Tensor | float | None = None) -> None:
        """As KeyIndex.update; replaced keys make FAISS's index be built again at the next search."""
        super().update(ids, keys, radius)
        if keys is not None:
            self._indices = {}

    def _clear(self) -> None:
        super()._clear()
        self._indices = {}

    def _current(self, nearest: bool) -> Any:
        """FAISS's index for this metric, with all keys added so far."""
        faiss = self._library
        index = self._indices.get(nearest)
        if index is None:
            metric = faiss.METRIC_L2 if nearest else faiss.METRIC_INNER_PRODUCT
            index = self._indices[nearest] = faiss.index_factory(self.dim, self.factory, metric)
        if index.ntotal < self.n_added:
            rows = self.keys(torch.arange(index.ntotal, self.n_added)).float().numpy()
            if not index.is_trained:
                index.train(rows)
            index.add(rows)
        return index

    def _parameters(self, index: Any) -> Any:
        """Search parameters that leave removed keys out; None if there are none."""
        if len(self) == self.n_added:
            return None
        import numpy as np

        faiss = self._library
        alive = np.packbits(self._alive[: self.n_added].numpy(), bitorder="little")
        selector = faiss.IDSelectorBitmap(alive)
        transformed = isinstance(index, faiss.IndexPreTransform)
        inner = faiss.downcast_index(index.index) if transformed else index
        if isinstance(inner, faiss.IndexIVF):
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=inner.nprobe)
        elif isinstance(inner, faiss.IndexHNSW):
            parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=inner.hnsw.efSearch)
        else:
            parameters = faiss.SearchParameters(sel=selector)
        return faiss.SearchParametersPreTransform(index_params=parameters) if transformed else parameters

    def _search_checked(self, queries: Tensor, k: int, nearest: bool, highest: bool) -> tuple[Tensor, Tensor]:
        found = nothing_found(queries, k)
        if not len(self) or not len(queries):
            return found
        if backend.requested() not in (None, "torch", "cpp"):
            check.once(logging.WARNING, "FaissIndex: candidates come from FAISS, whatever the backend")
        index = self._current(nearest)
        n = min(max(self.candidates, k), self.n_added)
        ids = torch.from_numpy(index.search(queries.numpy(), n, params=self._parameters(index))[1])
        ids = ids.sort(dim=1).values
        b, place = (ids >= 0).nonzero(as_tuple=True)
        j = ids[b, place]
        b, j = b[self._alive[j]], j[self._alive[j]]
        for chunk, places, rows in self._split(j):
            scale = None if chunk.scale is None else chunk.scale[: chunk.n]
            values = exact_values(queries, chunk.keys[: chunk.n], scale, b[places], rows, nearest)
            found = merge(*found, b[places], values, rows + chunk.offset, highest)
        return found
