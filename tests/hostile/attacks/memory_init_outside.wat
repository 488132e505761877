;; Initialises memory from beyond its segment's end. Traps.
(module
  (memory (export "memory") 1)
  (data $d "0123456789abcdef")
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (memory.init $d (i32.const 0) (i32.const 8) (i32.const 16)) (i32.const 0)))
