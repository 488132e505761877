;; Fills and copies its table over and over. Ends when its fuel is burnt.
(module
  (memory (export "memory") 1)
  (table $t 1000 funcref)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (loop $l (table.fill $t (i32.const 0) (ref.null func) (i32.const 1000)) (table.copy (i32.const 0) (i32.const 1) (i32.const 999)) (br $l)) (unreachable)))
