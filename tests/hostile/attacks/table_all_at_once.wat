;; Asks for 2^32 - 1 table elements. Refused with -1.
(module
  (memory (export "memory") 1)
  (table $t 0 funcref)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32.add (table.grow $t (ref.null func) (i32.const -1)) (i32.const 1))))
