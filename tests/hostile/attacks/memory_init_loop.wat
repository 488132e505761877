;; Initialises memory from a passive segment over and over. Ends when its fuel is burnt.
(module
  (memory (export "memory") 1)
  (data $d "0123456789abcdef")
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (loop $l (memory.init $d (i32.const 0) (i32.const 0) (i32.const 16)) (br $l)) (unreachable)))
