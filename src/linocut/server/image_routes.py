"""The gallery over HTTP: search, mark, delete and restore, files, export, recipes."""

import io
import json
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from typing import IO, Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse

from linocut.errors import LinocutError, UsageError
from linocut.pipeline.png import read_recipe, recipe_dict
from linocut.server import schemas
from linocut.server.marks import SIGNATURE
from linocut.server.service import Service
from linocut.server.settings import LARGEST_SIDE

UPLOAD_TYPES = ("image/png", "application/octet-stream")
ZIP_IN_MEMORY = 16 << 20
PIECE = 1 << 16
SearchText = Annotated[str, Query(max_length=400)]
Time = Annotated[float | None, Query(ge=-1e11, le=1e11)]


class WrongType(LinocutError):
    """An upload is of a kind that is not read here."""


class Upload(io.BytesIO):
    """Bytes that a client sent, under a name for messages."""

    def __str__(self) -> str:
        return "the uploaded file"


def image_routes(service: Service) -> APIRouter:
    """The routes below /api/images, /api/tags and /api/recipe. Plain functions: they run beside the event loop."""
    router, gallery = APIRouter(prefix="/api", tags=["images"]), service.gallery

    def changed(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        service.everyone.publish("gallery", {"changed": [entry["id"] for entry in entries]})
        return entries

    @router.get("/images", response_model=schemas.Page)
    def search_images(query: SearchText = "", model: SearchText | None = None, tag: SearchText | None = None,
                      favourite: bool | None = None, trashed: bool = False, since: Time = None, until: Time = None,
                      after: Annotated[str | None, Query(max_length=64)] = None,
                      limit: Annotated[int, Query(ge=1, le=200)] = 60) -> dict[str, Any]:
        entries, cursor, total = gallery.search(query, model=model, tag=tag, favourite=favourite, trashed=trashed,
                                                since=since, until=until, after=after, limit=limit)
        return {"images": entries, "next": cursor, "total": total}

    @router.get("/tags", response_model=schemas.Tags)
    def list_tags() -> dict[str, Any]:
        return {"tags": gallery.tags()}

    @router.post("/images/trash", response_model=schemas.Images)
    def trash_images(asked: schemas.Ids) -> dict[str, Any]:
        return {"images": changed(gallery.trash(asked.ids))}

    @router.post("/images/restore", response_model=schemas.Images)
    def restore_images(asked: schemas.Ids) -> dict[str, Any]:
        return {"images": changed(gallery.restore(asked.ids))}

    @router.post("/images/purge", response_model=schemas.Images)
    def purge_images(asked: schemas.Ids) -> dict[str, Any]:
        """Destroy pictures that lie in the trash. This cannot be undone."""
        return {"images": changed(gallery.purge(asked.ids))}

    @router.post("/images/export", response_class=StreamingResponse, responses={
        200: {"content": {"application/zip": {}}, "description": "A ZIP of PNG files and recipes.json."}})
    def export_images(asked: schemas.Ids) -> StreamingResponse:
        archive = _zip(service, list(dict.fromkeys(asked.ids)))
        return StreamingResponse(_pieces(archive), media_type="application/zip",
                                 headers={"content-disposition": 'attachment; filename="linocut.zip"'})

    @router.get("/images/{image_id}", response_model=schemas.ImageWithRecipe)
    def get_image(image_id: str) -> dict[str, Any]:
        return {**gallery.entry(image_id), "recipe": gallery.recipe(image_id)}

    @router.patch("/images/{image_id}", response_model=schemas.Image)
    def mark_image(image_id: str, marks: schemas.Marks) -> dict[str, Any]:
        return changed([gallery.mark(image_id, marks.favourite, marks.tags)])[0]

    @router.get("/images/{image_id}/file", response_class=Response, responses={
        200: {"content": {"image/png": {}}, "description": "The PNG with its recipe."}})
    def get_file(image_id: str, download: bool = False) -> Response:
        png = gallery.read(image_id)  # found, so the ID is one of ours and safe in a header
        how = "attachment" if download else "inline"
        return Response(png, media_type="image/png", headers={
            "content-disposition": f'{how}; filename="{image_id}.png"',
            "cache-control": "private, no-cache"})  # marks are in the file, so it may change

    @router.get("/images/{image_id}/thumbnail", response_class=Response, responses={
        200: {"content": {"image/webp": {}}, "description": "At most 256 pixels on the longer side."}})
    def get_thumbnail(image_id: str) -> Response:
        return Response(gallery.thumbnail(image_id), media_type="image/webp",
                        headers={"cache-control": "private, max-age=31536000, immutable"})

    @router.post("/recipe", response_model=schemas.FoundRecipe, openapi_extra={"requestBody": {
        "required": True, "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}})
    async def recipe_of_upload(request: Request) -> dict[str, Any]:
        """The recipe in a PNG that linocut wrote; the body is the file. Nothing is kept."""
        kind = request.headers.get("content-type", UPLOAD_TYPES[0]).partition(";")[0].strip().lower()
        if kind not in UPLOAD_TYPES:
            raise WrongType(f"the body must be a PNG (expected Content-Type image/png, found {kind[:80]!r})")
        data = await request.body()
        _check_size(data, max(LARGEST_SIDE, service.settings.largest_side) ** 2)
        recipe = await run_in_threadpool(read_recipe, Upload(data))
        folder = service.catalogue.folders.get(recipe.model)
        same = None if folder is None else await run_in_threadpool(folder.hash) == recipe.model_hash
        return {"recipe": recipe_dict(recipe), "model_known": folder is not None, "same_weights": same}

    return router


def _check_size(png: bytes, most_pixels: int) -> None:
    """Refuse a picture whose pixels would fill the memory: they are decoded where text is looked for behind them."""
    if len(png) >= 24 and png.startswith(SIGNATURE):
        if png[12:16] != b"IHDR":  # a PNG begins with its size (specification 11.2.2), but readers take it later too
            raise UsageError("the uploaded file is not a PNG (expected its size at its beginning, found another chunk)")
        width, height = struct.unpack_from(">II", png, 16)
        if width * height > most_pixels:
            raise UsageError(f"the uploaded file is too large a picture (expected at most {most_pixels} pixels, found "
                             f"{width} x {height}); linocut generate --from-image reads it")


def _zip(service: Service, ids: list[str]) -> IO[bytes]:
    """Return a ZIP of pictures and their recipes, in memory while it is small. Raises NoSuchImage."""
    entries = [service.gallery.entry(image_id) for image_id in ids]  # all of them are looked up before any is read
    archive = tempfile.SpooledTemporaryFile(ZIP_IN_MEMORY)  # noqa: SIM115  (it is closed when it has been sent)
    recipes = []
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as writer:  # PNGs do not get smaller
        for entry in entries:
            name = f"{entry['id']}.png"
            writer.writestr(name, service.gallery.read(entry["id"]))
            recipes.append({"file": name, "favourite": entry["favourite"], "tags": entry["tags"],
                            "recipe": service.gallery.recipe(entry["id"])})
        writer.writestr("recipes.json", json.dumps(recipes, ensure_ascii=False, indent=1))
    archive.seek(0)
    return archive


def _pieces(archive: IO[bytes]) -> Iterator[bytes]:
    with archive:
        while piece := archive.read(PIECE):
            yield piece
