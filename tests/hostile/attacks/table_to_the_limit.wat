;; Grows its table until it is refused. Gets no more than its limit.
(module
  (memory (export "memory") 1)
  (table $t 0 funcref)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (loop $l (br_if $l (i32.ne (table.grow $t (ref.null func) (i32.const 100)) (i32.const -1))))
    (table.size $t)))
