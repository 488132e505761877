;; Needs 2^48 pages of a 64-bit memory, all there can be. Refused.
(module (memory (export "memory") i64 0x1000000000000)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (i32.const 0)))
