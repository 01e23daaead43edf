"""Parsing of URLs, and which hosts and addresses are public."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from cluster.net.urls import UrlRefused, check_url, is_public, parse_hosts, parse_url

ODD_FORMS = [
    "http://2130706433/",
    "http://0x7f.1/",
    "http://0x7f000001/",
    "http://0/",
    "http://127.1/",
    "http://0177.0.0.1/",
    "http://127.0.0.1./",
    "http://example.com./",
    "http://1.2.3.4.5/",
    "http://good\\@evil/",
    "http://good\\.evil/",
    "http:\\\\evil/",
    "http://user@example.com/",
    "http://user:password@example.com/",
    "http://good@evil@example.com/",
    "http://@example.com/",
    "http://exämple.com/",
    "http://еxample.com/",  # noqa: RUF001 - a Cyrillic letter
    "http://１２７.0.0.1/",  # noqa: RUF001 - full-width digits
    "http://127。0。0。1/",
    "http://ex%61mple.com/",
    "http://%31%32%37.0.0.1/",
    "http://[::1%25eth0]/",
    "http://[::1/",
    "http://::1/",
    "http://[::ffff:127.0.0.1.nip.io]/",
    "http://-example.com/",
    "http://exa mple.com/",
    "http://example.com/a b",
    "http://example.com\t/",
    "http://example.com/\n",
    "http://example.com/\x00",
    "http://example.com:0/",
    "http://example.com:65536/",
    "http://example.com:٤٤٣/",
    "http://example.com:80:80/",
    "http://example.com:/",
    "http://example..com/",
    "http:///path",
    "http://",
    "http:/example.com",
    "http:example.com",
    "//example.com/",
    f"http://{'a' * 64}.com/",
    f"http://{'a.' * 130}com/",
    "file:///etc/passwd",
    "ftp://example.com/a",
    "gopher://example.com/",
    "data:text/plain,a",
    "",
]


@pytest.mark.parametrize("text", ODD_FORMS)
def test_what_is_no_plain_url_is_refused(text: str) -> None:
    with pytest.raises(UrlRefused):
        parse_url(text)


def test_a_url_and_its_parts() -> None:
    url = parse_url("HTTPS://Files.Example.COM:8443/a/B.safetensors?X-Amz-Signature=s3cret#part")
    assert (url.scheme, url.host, url.port) == ("https", "files.example.com", 8443)
    assert url.target == "/a/B.safetensors?X-Amz-Signature=s3cret"
    assert str(url) == "https://files.example.com:8443/a/B.safetensors"
    assert url.full == f"{url}?X-Amz-Signature=s3cret"
    assert parse_url(url.full) == url
    assert str(parse_url("http://example.com:80")) == "http://example.com/"
    assert str(parse_url("https://[2606:4700::0:1111]/")) == "https://[2606:4700::1111]/"


PRIVATE = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:8.8.8.8",
    "::ffff:0:127.0.0.1",
    "64:ff9b::169.254.169.254",
    "64:ff9b::8.8.8.8",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:0:7f00:1::",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "ff02::1",
]

PUBLIC = ["1.1.1.1", "8.8.8.8", "172.15.0.1", "172.32.0.1", "100.128.0.1", "223.255.255.255"]
PUBLIC_V6 = ["2606:4700::1111", "2a00:1450::1", "2001:4860:4860::8888"]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(UrlRefused):
        check_url(parse_url(f"http://{host}/"), frozenset())


@pytest.mark.parametrize("address", [*PUBLIC, *PUBLIC_V6])
def test_public_addresses(address: str) -> None:
    assert is_public(ip_address(address))
    host = f"[{address}]" if ":" in address else address
    check_url(parse_url(f"https://{host}/"), frozenset())


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "kubernetes",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "metadata.google.internal",
        "printer.local",
        "a.localhost",
        "host.docker.internal",
        "example.com:8265",
        "example.com:6379",
    ],
)
def test_names_and_ports_that_show_a_private_network(host: str) -> None:
    url = parse_url(f"http://{host}/")
    with pytest.raises(UrlRefused):
        check_url(url, frozenset())
    check_url(url, parse_hosts([host]))
    check_url(url, parse_hosts([url.host]))


def test_a_list_of_hosts_is_exact() -> None:
    listed = parse_hosts(["127.0.0.1:9000", "Store.Internal", "[::1]", "[0:0::1]:80"])
    for text in ("http://127.0.0.1:9000/", "http://store.internal:1/", "http://[::1]:8/"):
        check_url(parse_url(text), listed)
    for text in (
        "http://127.0.0.1:9001/",
        "http://127.0.0.1/",
        "http://a.store.internal/",
        "http://127.0.0.2/",
    ):
        with pytest.raises(UrlRefused):
            check_url(parse_url(text), listed)


@pytest.mark.parametrize(
    "entry", ["http://example.com", "a b", "2130706433", "", "a:b", "*.example.com", "a/b"]
)
def test_what_is_no_entry_of_the_list(entry: str) -> None:
    with pytest.raises(ValueError, match="host"):
        parse_hosts([entry])
