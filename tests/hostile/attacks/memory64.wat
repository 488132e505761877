;; Has a 64-bit memory and grows it until it is refused, then by 2^48 pages. Allowed; gets exactly its limit.
(module (memory (export "memory") i64 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32)
    (loop $l (br_if $l (i64.ne (memory.grow (i64.const 1)) (i64.const -1))))
    (if (i64.ne (memory.grow (i64.const 0x1000000000000)) (i64.const -1)) (then (return (i32.const -1))))
    (if (i64.ne (memory.grow (i64.const -1)) (i64.const -1)) (then (return (i32.const -2))))
    (i32.wrap_i64 (memory.size))))
