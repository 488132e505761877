;; Loads far beyond its memory, inside and beyond what is reserved for it. Traps.
(module
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32.load offset=0xfffffff0 (i32.const 0x7fffffff))))
