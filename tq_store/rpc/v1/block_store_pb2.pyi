from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PutOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PUT_OUTCOME_UNSPECIFIED: _ClassVar[PutOutcome]
    PUT_OUTCOME_STORED: _ClassVar[PutOutcome]
    PUT_OUTCOME_PRESENT: _ClassVar[PutOutcome]
    PUT_OUTCOME_REFUSED: _ClassVar[PutOutcome]
    PUT_OUTCOME_INVALID: _ClassVar[PutOutcome]
PUT_OUTCOME_UNSPECIFIED: PutOutcome
PUT_OUTCOME_STORED: PutOutcome
PUT_OUTCOME_PRESENT: PutOutcome
PUT_OUTCOME_REFUSED: PutOutcome
PUT_OUTCOME_INVALID: PutOutcome

class Keys(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Flags(_message.Message):
    __slots__ = ("flags",)
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    flags: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, flags: _Optional[_Iterable[bool]] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("num_leading_hits",)
    NUM_LEADING_HITS_FIELD_NUMBER: _ClassVar[int]
    num_leading_hits: int
    def __init__(self, num_leading_hits: _Optional[int] = ...) -> None: ...

class BlockFrame(_message.Message):
    __slots__ = ("index", "offset", "block_bytes", "key", "data")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    index: int
    offset: int
    block_bytes: int
    key: bytes
    data: bytes
    def __init__(self, index: _Optional[int] = ..., offset: _Optional[int] = ..., block_bytes: _Optional[int] = ..., key: _Optional[bytes] = ..., data: _Optional[bytes] = ...) -> None: ...

class SharedGetRequest(_message.Message):
    __slots__ = ("keys", "segment")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    segment: bytes
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., segment: _Optional[bytes] = ...) -> None: ...

class SharedGetResponse(_message.Message):
    __slots__ = ("block_bytes",)
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    block_bytes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, block_bytes: _Optional[_Iterable[int]] = ...) -> None: ...

class SharedPutRequest(_message.Message):
    __slots__ = ("segment", "block_bytes", "keys")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    segment: bytes
    block_bytes: _containers.RepeatedScalarFieldContainer[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, segment: _Optional[bytes] = ..., block_bytes: _Optional[_Iterable[int]] = ..., keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class OpenPipeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenPipeResponse(_message.Message):
    __slots__ = ("port", "ticket")
    PORT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    port: int
    ticket: bytes
    def __init__(self, port: _Optional[int] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class PipedGetRequest(_message.Message):
    __slots__ = ("keys", "pipe", "call")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PIPE_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    pipe: bytes
    call: int
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., pipe: _Optional[bytes] = ..., call: _Optional[int] = ...) -> None: ...

class PipedGetResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PutResponse(_message.Message):
    __slots__ = ("outcomes",)
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedScalarFieldContainer[PutOutcome]
    def __init__(self, outcomes: _Optional[_Iterable[_Union[PutOutcome, str]]] = ...) -> None: ...

class PurgeRequest(_message.Message):
    __slots__ = ("namespace", "all")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    all: bool
    def __init__(self, namespace: _Optional[bytes] = ..., all: bool = ...) -> None: ...

class PurgeResponse(_message.Message):
    __slots__ = ("num_blocks",)
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    def __init__(self, num_blocks: _Optional[int] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TierStats(_message.Message):
    __slots__ = ("name", "num_blocks", "used_bytes", "budget_bytes", "evicted_blocks", "namespaces")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVICTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_blocks: int
    used_bytes: int
    budget_bytes: int
    evicted_blocks: int
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceUsage]
    def __init__(self, name: _Optional[str] = ..., num_blocks: _Optional[int] = ..., used_bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ..., evicted_blocks: _Optional[int] = ..., namespaces: _Optional[_Iterable[_Union[NamespaceUsage, _Mapping]]] = ...) -> None: ...

class NamespaceUsage(_message.Message):
    __slots__ = ("namespace", "num_blocks", "used_bytes")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    num_blocks: int
    used_bytes: int
    def __init__(self, namespace: _Optional[bytes] = ..., num_blocks: _Optional[int] = ..., used_bytes: _Optional[int] = ...) -> None: ...

class ShardStats(_message.Message):
    __slots__ = ("tier", "name", "is_open", "failed_calls", "lost_keys")
    TIER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    IS_OPEN_FIELD_NUMBER: _ClassVar[int]
    FAILED_CALLS_FIELD_NUMBER: _ClassVar[int]
    LOST_KEYS_FIELD_NUMBER: _ClassVar[int]
    tier: str
    name: str
    is_open: bool
    failed_calls: int
    lost_keys: int
    def __init__(self, tier: _Optional[str] = ..., name: _Optional[str] = ..., is_open: bool = ..., failed_calls: _Optional[int] = ..., lost_keys: _Optional[int] = ...) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("tiers", "counters", "version", "uptime_s", "shards")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TIERS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    tiers: _containers.RepeatedCompositeFieldContainer[TierStats]
    counters: _containers.ScalarMap[str, int]
    version: str
    uptime_s: float
    shards: _containers.RepeatedCompositeFieldContainer[ShardStats]
    def __init__(self, tiers: _Optional[_Iterable[_Union[TierStats, _Mapping]]] = ..., counters: _Optional[_Mapping[str, int]] = ..., version: _Optional[str] = ..., uptime_s: _Optional[float] = ..., shards: _Optional[_Iterable[_Union[ShardStats, _Mapping]]] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    def __init__(self, key: _Optional[bytes] = ...) -> None: ...

class TierCopy(_message.Message):
    __slots__ = ("tier", "block_bytes", "header", "problem")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    tier: str
    block_bytes: int
    header: bytes
    problem: str
    def __init__(self, tier: _Optional[str] = ..., block_bytes: _Optional[int] = ..., header: _Optional[bytes] = ..., problem: _Optional[str] = ...) -> None: ...

class InspectResponse(_message.Message):
    __slots__ = ("copies",)
    COPIES_FIELD_NUMBER: _ClassVar[int]
    copies: _containers.RepeatedCompositeFieldContainer[TierCopy]
    def __init__(self, copies: _Optional[_Iterable[_Union[TierCopy, _Mapping]]] = ...) -> None: ...

class PingRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PingResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: str
    def __init__(self, version: _Optional[str] = ...) -> None: ...
