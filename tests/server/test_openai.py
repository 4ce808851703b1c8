"""OpenAI's own Python client, pointed at the server."""

import base64
import io
import threading
import urllib.request

import openai
import pytest
from conftest import TOKEN
from PIL import Image

SMALL = {"size": "64x64", "extra_body": {"steps": 2, "seed": 5}}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def picture(encoded):
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["embedded", "embedded-binary"]
    assert client.models.retrieve("embedded").owned_by == "linocut"
    with pytest.raises(openai.NotFoundError, match="embedded-binary"):
        client.models.retrieve("dall-e-3")


def test_pictures_come_as_base64(client):
    found = client.images.generate(prompt="a red car", model="embedded", n=2, **SMALL)
    first, second = (picture(item.b64_json) for item in found.data)
    assert first.format == "PNG"
    assert first.size == second.size == (64, 64)
    assert '"seed": 5' in first.info["linocut"]
    assert '"seed": 6' in second.info["linocut"]
    assert found.created > 1e9


def test_pictures_come_as_links_that_open(client, server):
    found = client.images.generate(prompt="a red car", response_format="url", **SMALL)
    assert found.data[0].url.startswith(server.url)
    with urllib.request.urlopen(found.data[0].url) as response:
        assert Image.open(io.BytesIO(response.read())).size == (64, 64)


def test_a_link_opens_its_picture_without_the_token_and_no_other(lan_server):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{lan_server.port}/v1", api_key=TOKEN, max_retries=0)
    one, two = client.images.generate(prompt="a red car", response_format="url", n=2, **SMALL).data
    with urllib.request.urlopen(one.url) as response:
        assert response.read().startswith(b"\x89PNG")
    path = two.url.split(str(lan_server.port))[1].split("?")[0]
    assert lan_server.ask("GET", f"{path}?key={one.url.split('key=')[1]}").status == 401
    wrong = openai.OpenAI(base_url=f"http://127.0.0.1:{lan_server.port}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="token"):
        wrong.models.list()


def test_a_stream_shows_partial_pictures_and_ends_with_the_whole_one(client):
    events = list(client.images.generate(prompt="a blue cup", stream=True, partial_images=2, size="64x64",
                                         extra_body={"steps": 6, "seed": 5}))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    pictures = [picture(event.b64_json) for event in events]
    assert {each.size for each in pictures} == {(64, 64)}
    whole = client.images.generate(prompt="a blue cup", size="64x64", extra_body={"steps": 6, "seed": 5})
    assert whole.data[0].b64_json is not None
    assert picture(whole.data[0].b64_json).tobytes() == pictures[-1].tobytes()


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_formats(client, kind):
    found = client.images.generate(prompt="a red car", output_format=kind, **SMALL)
    assert picture(found.data[0].b64_json).format == kind.upper()


@pytest.mark.parametrize(("facts", "error", "words"), [
    ({"model": "gpt-image-1"}, openai.NotFoundError, "embedded"), ({"size": "65x64"}, openai.BadRequestError, "32"),
    ({"size": "1024x1024"}, openai.BadRequestError, "at most 256"), ({"n": 11}, openai.UnprocessableEntityError, "10"),
    ({"size": "big"}, openai.UnprocessableEntityError, "size"),
    ({"stream": True, "n": 2}, openai.BadRequestError, "single")])
def test_errors_are_those_of_the_client_with_a_sentence(client, facts, error, words):
    with pytest.raises(error, match=words):
        client.images.generate(prompt="a red car", **facts)


def test_a_job_that_is_cancelled_in_the_studio_is_not_drawn_again(server):
    """OpenAI's client tries again by itself after most errors; what a person has stopped must stay stopped."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=3)
    errors = []

    def ask():
        try:
            client.images.generate(prompt="a car that is stopped", size="256x256", extra_body={"steps": 100})
        except openai.APIStatusError as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()

    def mine():
        return [job for job in server.ask("GET", "/api/jobs").json["jobs"] if "that is stopped" in job["prompt"]]

    while not mine():
        pass
    assert server.ask("DELETE", f"/api/jobs/{mine()[0]['id']}").status == 200
    asking.join(60)
    assert [error.status_code for error in errors] == [409]
    assert "cancelled" in str(errors[0])
    assert len(mine()) == 1


def test_hanging_up_cancels(server):
    connection = server.connect()
    connection.request("POST", "/v1/images/generations", '{"prompt": "a car of a client that left", "steps": 100}',
                       server.headers)

    def mine():
        return [job for job in server.ask("GET", "/api/jobs").json["jobs"] if "that left" in job["prompt"]]

    while not mine():
        pass
    connection.close()
    assert server.finished(mine()[0])["state"] == "cancelled"
