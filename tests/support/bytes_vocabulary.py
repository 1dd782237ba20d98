"""A vocabulary whose tokens are the 256 bytes, one that ends generation and one control token."""

END = 256
CONTROL = 257
SIZE = 258


class BytesVocabulary:
    def bytes_of(self, token: int) -> bytes:
        return bytes([token]) if token < END else b""

    def piece_of(self, token: int) -> bytes:
        return {END: b"<end>", CONTROL: b"<c>"}.get(token) or bytes([token])

    def is_eog(self, token: int) -> bool:
        return token == END
